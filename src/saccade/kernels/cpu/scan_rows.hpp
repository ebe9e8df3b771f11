// Rows of tensors to and from fp32 scratch, and small matrices turned over.
#pragma once
#include "problem.hpp"
#include "tile.hpp"

namespace saccade::SACCADE_ISA {

// fp32 to bf16, to nearest even; unlike `narrow_bf16` NaN stays NaN on every instruction set, and subnormals are kept.
INLINE vh round_bf16(vf x) {
  vu bits = (vu)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : vu{} + 0x7fc0u, vh);
}

// fp32 to fp16, to nearest even, subnormals, infinities and NaN included.
INLINE vh round_fp16(vf x) {
#if defined(__AVX512F__)
  return (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vu bits = (vu)x, sign = (bits & 0x80000000u) >> 16, size = bits & 0x7fffffffu;
  vu normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  vu small = (vu)((vf)size + 0.5f) - 0x3f000000u;  // the sum's last bit is worth 2^-24, as a subnormal's
  vu half = (vi)size < (113 << 23) ? small : normal;
  half = (vi)size >= (143 << 23) ? vu{} + 0x7c00u : half;  // 2^16 and more; what rounds up to it `normal` makes so
  half = (vi)size > (255 << 23) ? vu{} + 0x7e00u : half;
  return __builtin_convertvector(half | sign, vh);
#endif
}

// LANES elements from `row` on, of which the first `count` exist; the others are 0.
INLINE vf load_some(const char* row, int64_t first, int64_t count, int32_t storage) {
  if (storage == FP32) {
    const float* from = reinterpret_cast<const float*>(row) + first;
    if (count >= LANES) return load(from);
    vf x = {};
    for (int i = 0; i < count; ++i) x[i] = from[i];
    return x;
  }
  const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + first;
  vh half = {};
  if (count >= LANES) {
    half = *reinterpret_cast<const vh_any*>(from);
  } else {
    for (int i = 0; i < count; ++i) half[i] = from[i];
  }
  return storage == BF16 ? widen_bf16(half) : widen_fp16(half);
}

INLINE void store_some(char* row, int64_t first, int64_t count, int32_t storage, vf x) {
  if (storage == FP32) {
    float* to = reinterpret_cast<float*>(row) + first;
    if (count >= LANES) return store(to, x);
    for (int i = 0; i < count; ++i) to[i] = x[i];
    return;
  }
  uint16_t* to = reinterpret_cast<uint16_t*>(row) + first;
  vh half = storage == BF16 ? round_bf16(x) : round_fp16(x);
  if (count >= LANES) {
    *reinterpret_cast<vh_any*>(to) = half;
    return;
  }
  for (int i = 0; i < count; ++i) to[i] = half[i];
}

// `count` rows of `dim` elements, `stride` elements apart, times `scale`, into rows of `wide` floats; what is left of each
// row, and of a started block of rows, becomes 0. Whether something is NaN or infinite.
static bool unpack(const char* data, int64_t stride, int64_t count, int64_t dim, int32_t storage, float scale, float* out,
                   int64_t wide) {
  vf poison = {};
  int64_t bytes = stride * (storage == FP32 ? 4 : 2);
  for (int64_t i = 0; i < count; ++i, data += bytes)
    for (int64_t d = 0; d < wide; d += LANES) {
      vf x = d < dim ? load_some(data, d, dim - d, storage) : vf{};
      poison += x * 0.0f;
      store(out + i * wide + d, x * scale);
    }
  for (int64_t d = count * wide; d < round_up(count, BLOCK) * wide; d += LANES) store(out + d, vf{});
  bool found = false;
  for (int i = 0; i < LANES; ++i) found |= poison[i] != 0;
  return found;
}

// to[c][r] = from[r][c], LANES x LANES
INLINE void turn(const float* from, int64_t from_step, float* to, int64_t to_step) {
  vf x[LANES];
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) x[r] = load(from + r * from_step);
  transpose(x);
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) store(to + r * to_step, x[r]);
}

// A block of R rows and V vectors of sums.
template <int R, int V>
struct Sums {
  vf acc[R][V];

#define EACH_SUM                             \
  _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) _Pragma("GCC unroll 2") for (int n = 0; n < V; ++n)
#define METHOD inline __attribute__((always_inline))

  METHOD void clear() { EACH_SUM acc[r][n] = vf{}; }
  METHOD void take(const float* from, int64_t step) { EACH_SUM acc[r][n] = load(from + r * step + n * LANES); }
  METHOD void give(float* to, int64_t step) const { EACH_SUM store(to + r * step + n * LANES, acc[r][n]); }
  METHOD void scale_rows(const float* factor) { EACH_SUM acc[r][n] *= factor[r]; }
  METHOD void scale_lanes(const float* factor) { EACH_SUM acc[r][n] *= load(factor + n * LANES); }

  // += sum over t of a[r * a_row + t * a_step] * b[t * b_step + lane]
  METHOD void add(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t depth) {
    for (int64_t t = 0; t < depth; ++t, a += a_step, b += b_step) {
      vf x[V];
#pragma GCC unroll 2
      for (int n = 0; n < V; ++n) x[n] = load(b + n * LANES);
      EACH_SUM acc[r][n] += a[r * a_row] * x[n];
    }
  }
#undef EACH_SUM
#undef METHOD
};

// f<R, V>(row, column) for tiles of `rows` x `columns`: blocks of rows, or single rows where `exact`.
template <class F>
INLINE void each_tile(int64_t rows, int64_t columns, bool exact, F f) {
  for (int64_t column = 0; column < columns; column += PANEL) {
    bool narrow = columns - column <= LANES;
    for (int64_t row = 0; row < rows; row += exact ? 1 : BLOCK) {
      if (exact) {
        f.template operator()<1, 2>(row, column);
      } else if (narrow) {
        f.template operator()<BLOCK, 1>(row, column);
      } else {
        f.template operator()<BLOCK, 2>(row, column);
      }
    }
  }
}

}  // namespace saccade::SACCADE_ISA
