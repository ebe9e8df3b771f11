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

template <int32_t STORAGE>
INLINE vf load_stored(const char* row, int64_t d) {
  if constexpr (STORAGE == FP32) return load(reinterpret_cast<const float*>(row) + d);
  vh half = *reinterpret_cast<const vh_any*>(row + 2 * d);
  return STORAGE == BF16 ? widen_bf16(half) : widen_fp16(half);
}

template <int32_t STORAGE>
static __attribute__((noinline)) void pack_stored(const char* const* rows, int64_t dim, float factor, float* out, int64_t next,
                                                  int64_t ahead) {
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    vf block[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) block[i] = load_stored<STORAGE>(rows[i], d);
    if (ahead)
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) __builtin_prefetch(rows[i] + ahead + d * (STORAGE == FP32 ? 4 : 2));
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) store(out + (d + i) * next, block[i] * factor);
  }
  for (; d < dim; ++d)
    for (int i = 0; i < LANES; ++i) out[d * next + i] = read(rows[i], d, STORAGE) * factor;
}

// Rows, one for each lane, times `factor`, across the lanes: out[d * next + lane]. Asks for what lies `ahead` bytes further.
static void pack_rows(const char* const* rows, int32_t storage, int64_t dim, float factor, float* out, int64_t next,
                      int64_t ahead = 0) {
  if (storage == FP32) return pack_stored<FP32>(rows, dim, factor, out, next, ahead);
  if (storage == BF16) return pack_stored<BF16>(rows, dim, factor, out, next, ahead);
  pack_stored<FP16>(rows, dim, factor, out, next, ahead);
}

// The inverse, from [dim][LANES]; nothing is written where a row is null.
static void unpack_rows(const float* columns, int64_t dim, vf factor, float* const* rows) {
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    vf block[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) block[i] = load(columns + (d + i) * LANES) * factor;
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      if (rows[i]) store(rows[i] + d, block[i]);
  }
  for (; d < dim; ++d)
    for (int i = 0; i < LANES; ++i)
      if (rows[i]) rows[i][d] = columns[d * LANES + i] * factor[i];
}

}  // namespace saccade::SACCADE_ISA
