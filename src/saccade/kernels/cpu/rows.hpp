// Reading the rows of q, k and v, whatever their storage.
#pragma once
#include "problem.hpp"
#include "simd.hpp"

namespace saccade::SACCADE_ISA {

INLINE const char* row_of(const Rows& x, int64_t b, int64_t h, int64_t row, int32_t storage) {
  int64_t place = b * x.batch_stride + h * x.head_stride + row * x.row_stride;
  return static_cast<const char*>(x.data) + place * (storage == FP32 ? 4 : 2);
}

INLINE float read(const char* row, int64_t d, int32_t storage) {
  if (storage == FP32) return reinterpret_cast<const float*>(row)[d];
  uint16_t half = reinterpret_cast<const uint16_t*>(row)[d];
  vh wide = {};
  wide[0] = half;
  return (storage == BF16 ? widen_bf16(wide) : widen_fp16(wide))[0];
}

static void widen_row(const char* row, int64_t dim, int32_t storage, float* out) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(row);
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    vh x = *reinterpret_cast<const vh_any*>(half + d);
    store(out + d, storage == BF16 ? widen_bf16(x) : widen_fp16(x));
  }
  for (; d < dim; ++d) out[d] = read(row, d, storage);
}

// Two rows of bf16 as one row of pairs; `odd` may be null (zeros).
static void pair_rows(const char* even, const char* odd, int64_t dim, uint32_t* out) {
  const uint16_t *e = reinterpret_cast<const uint16_t*>(even), *o = reinterpret_cast<const uint16_t*>(odd);
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    vu low = widen_bits(*reinterpret_cast<const vh_any*>(e + d)), high = {};
    if (o) high = widen_bits(*reinterpret_cast<const vh_any*>(o + d));
    *reinterpret_cast<vu_any*>(out + d) = low | (high << 16);
  }
  for (; d < dim; ++d) out[d] = e[d] | (o ? uint32_t(o[d]) << 16 : 0u);
}

INLINE bool has_poison(const float* row, int64_t dim) {  // NaN or infinity
  float sum = 0;
  vf total = {};
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) total += load(row + d) * 0.0f;
  for (; d < dim; ++d) sum += row[d] * 0.0f;
  for (int i = 0; i < LANES; ++i) sum += total[i];
  return sum != 0;  // NaN compares unequal to everything
}

}  // namespace saccade::SACCADE_ISA
