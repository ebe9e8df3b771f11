// The gradients of attention. `saccade.kernels.cpu.backward` mirrors these structs.
#pragma once
#include "problem.hpp"

namespace saccade {

// Gradients of `forward` by q, k and v. Its `lse` is read, its `out` is not used; keys and values must be finite.
struct AttentionBackward {
  Attention forward;
  Rows out, grad_out;                // [B, H, M, E]
  int32_t out_storage, grad_storage;
  const float* grad_lse;             // [B, H, M], or null
  float* delta;                      // [B, H, M]: receives out . grad_out - grad_lse, 0 where nothing is seen; has it, if out is null
  float* dq;                         // [B, H, M, D], zeros
  float *dk, *dv;                    // [B, G, N, D], [B, G, N, E]
};

// When a unit may add to the gradients of the queries of a step: after the unit before it did.
struct Turns {
  void* state;
  void (*wait)(void* state, int64_t unit, int64_t step);
  void (*pass)(void* state, int64_t unit, int64_t step);
};

}  // namespace saccade
