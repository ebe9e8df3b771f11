// What Python hands over: pointers, shapes and strides. `saccade.kernels.cpu.problem` mirrors these structs.
#pragma once
#include <cstdint>

namespace saccade {

enum Storage : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };

// A tensor [B, heads, rows, dim] whose last axis is contiguous; strides in elements.
struct Rows {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// Softmax attention of q [B, H, M, D] over k [B, G, N, D], v [B, G, N, E]; scores are scale * q.k, capped, lowered by
// distance (ALiBi), biased, masked.
// Pairs kept are those of the band, of the layout if there is one, and of equal segments if there are any.
struct Attention {
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  int32_t storage, threads;
  Rows q, k, v;
  float* out;            // [B, H, M, E]
  float* lse;            // [B, H, M], natural logarithm
  float scale, softcap;  // softcap 0: none
  int64_t left, right;   // query i sees keys i + N - M - left .. i + N - M + right; -1: unbounded
  const float* bias;     // or null; strides may be 0
  int64_t bias_stride[4];
  const int32_t *q_segments, *kv_segments;  // or null; negative sees nothing
  int64_t q_segment_stride, kv_segment_stride;
  const int64_t* indptr;  // or null; BlockLayout: row (b * heads + h) * query_blocks + i owns entries indptr[row] ..
  const int32_t *indices, *kinds;
  const uint8_t* bits;
  int64_t layout_batch, layout_heads, block_q, block_k;
  const float* alibi;  // or null; [H]: query i's score of key j loses alibi[h] * |i + N - M - j|
};

}  // namespace saccade
