// What Python hands over for `scan`. `saccade.kernels.cpu.scan` mirrors these structs.
#pragma once
#include "problem.hpp"

namespace saccade {

// S_t = a_t S_{t-1} + k_t v_t^T, out_t = scale * S_t^T q_t: q [B, S, R, N, D], R sets of queries that read each of S states,
// k [B, S, N, D], v [B, S, N, E]; last axes contiguous, strides in elements.
struct Scan {
  int64_t batch, states, sets, tokens, dim, value_dim;
  int32_t storage, threads;
  const void* q;
  int64_t q_stride[4];  // batch, state, set, token
  Rows k, v;
  const float* log_decay;   // natural log of a, [B, S, N, 1 or D], or null
  int64_t decay_stride[3];  // batch, state, token; may be 0
  int64_t decay_dim;        // 1 or D
  float scale;
  const float* start;  // [B, S, D, E]
  void* out;           // [B, S, R, N, E], as q
  float* last;         // [B, S, D, E]
};

struct ScanGradient {
  Scan scan;  // without out and last
  const void* dout;
  int64_t dout_stride[4];  // batch, state, set, token
  const float* dlast;      // [B, S, D, E]
  void *dq, *dk, *dv;      // as q, k, v, contiguous
  float* dlog_decay;       // [B, S, N, decay_dim], or null
  float* dstart;           // [B, S, D, E]
};

}  // namespace saccade
