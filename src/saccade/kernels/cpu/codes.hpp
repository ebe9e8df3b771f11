// Rows of keys and values in whatever form they are stored, widened a vector at a time.
#pragma once
#include "rows.hpp"
#include "scores.hpp"
#include "problem_decode.hpp"

namespace saccade::SACCADE_ISA {

typedef int8_t vc __attribute__((vector_size(SACCADE_LANES), aligned(1), may_alias));
typedef uint32_t vu_half __attribute__((vector_size(4 * SACCADE_LANES), aligned(2), may_alias));

// x, bounded by the cap: cap * tanh(x / cap).
INLINE vf capped(vf x, float cap) {
  vf twice = x * (2 * LOG2E / cap);
  vf e = exp2v(twice > 120.0f ? splat(120.0f) : twice);
  vf small = x / cap;
  vf magnitude = small < 0.0f ? -small : small;
  return cap * (magnitude < 0.01f ? small - small * small * small / 3.0f : 1.0f - 2.0f / (e + 1.0f));
}

// LANES codes as integers.
INLINE vi widen_codes(const char* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const vc*>(p), vi);
#endif
}

// LANES channels from the `d`-th on, as stored; for INT4 all in one half of the row.
template <int32_t STORAGE>
INLINE vf raw(const char* row, int64_t d, int64_t half) {
  if constexpr (STORAGE == FP32) return load(reinterpret_cast<const float*>(row) + d);
  if constexpr (STORAGE == BF16) return widen_bf16(*reinterpret_cast<const vh_any*>(reinterpret_cast<const uint16_t*>(row) + d));
  if constexpr (STORAGE == FP16) return widen_fp16(*reinterpret_cast<const vh_any*>(reinterpret_cast<const uint16_t*>(row) + d));
  if constexpr (STORAGE == INT8) return __builtin_convertvector(widen_codes(row + d), vf);
  if constexpr (STORAGE == INT4) {
    vi byte = widen_codes(row + (d < half ? d : d - half));
    return __builtin_convertvector((d < half ? byte & 15 : byte >> 4 & 15) - 8, vf);
  }
}

INLINE float read_code(const char* row, int64_t d, int64_t dim, int32_t storage, const float* scale, const float* zero, int64_t group) {
  if (storage != INT8 && storage != INT4) return read(row, d, storage);
  float code;
  if (storage == INT8) {
    code = reinterpret_cast<const int8_t*>(row)[d];
  } else {
    const int byte = reinterpret_cast<const uint8_t*>(row)[d < dim / 2 ? d : d - dim / 2];
    code = float((d < dim / 2 ? byte & 15 : byte >> 4) - 8);
  }
  return (code - (zero ? zero[d / group] : 0.0f)) * scale[d / group];
}

// Calls body(start, end, group number) for the stretches of a row that have one scale and lie in one half.
template <class Body>
INLINE void stretches(int64_t dim, bool halves, int64_t group, const Body& body) {
  for (int64_t d = 0, number = 0, border = group; d < dim;) {
    int64_t end = border < dim ? border : dim;
    if (halves && d < dim / 2 && end > dim / 2) end = dim / 2;
    body(d, end, number);
    d = end;
    if (d == border) {
      ++number;
      border += group;
    }
  }
}

template <int32_t STORAGE>
static void widen_stored(const char* row, int64_t dim, const float* scale, const float* zero, int64_t group, int64_t width, float* out) {
  constexpr bool CODES = STORAGE == INT8 || STORAGE == INT4;
  stretches(dim, STORAGE == INT4, CODES ? group : dim, [&](int64_t d, int64_t end, int64_t n) {
    const float factor = CODES ? scale[n] : 1.0f, shift = CODES && zero ? -zero[n] * factor : 0.0f;
    for (; d + LANES <= end; d += LANES) {
      vf x = raw<STORAGE>(row, d, dim / 2);
      store(out + d, CODES ? x * factor + shift : x);
    }
    for (; d < end; ++d) out[d] = read_code(row, d, dim, STORAGE, scale, zero, group);
  });
  for (int64_t d = dim; d < width; ++d) out[d] = 0;
}

// A row as floats, zeros up to `width`.
static void widen_row_of(const char* row, int64_t dim, int32_t storage, const float* scale, const float* zero, int64_t group,
                        int64_t width, float* out) {
  switch (storage) {
    case FP32: return widen_stored<FP32>(row, dim, scale, zero, group, width, out);
    case BF16: return widen_stored<BF16>(row, dim, scale, zero, group, width, out);
    case FP16: return widen_stored<FP16>(row, dim, scale, zero, group, width, out);
    case INT8: return widen_stored<INT8>(row, dim, scale, zero, group, width, out);
    default: return widen_stored<INT4>(row, dim, scale, zero, group, width, out);
  }
}

INLINE uint16_t narrow_one(float x) { return narrow_bf16(splat(x))[0]; }

template <int32_t STORAGE>
static void narrow_stored(const char* row, int64_t dim, const float* scale, const float* zero, int64_t group, int64_t width, uint16_t* out) {
  stretches(dim, STORAGE == INT4, STORAGE == BF16 ? dim : group, [&](int64_t d, int64_t end, int64_t n) {
    const float factor = STORAGE == BF16 ? 1.0f : scale[n], shift = STORAGE != BF16 && zero ? -zero[n] * factor : 0.0f;
    for (; d + LANES <= end; d += LANES) {
      vf x = raw<STORAGE>(row, d, dim / 2);
      *reinterpret_cast<vh_any*>(out + d) = narrow_bf16(STORAGE == BF16 ? x : x * factor + shift);
    }
    for (; d < end; ++d) out[d] = narrow_one(read_code(row, d, dim, STORAGE, scale, zero, group));
  });
  for (int64_t d = dim; d < width; ++d) out[d] = 0;
}

// A row as bf16, zeros up to `width`.
static void narrow_codes(const char* row, int64_t dim, int32_t storage, const float* scale, const float* zero, int64_t group,
                         int64_t width, uint16_t* out) {
  switch (storage) {
    case BF16: return narrow_stored<BF16>(row, dim, scale, zero, group, width, out);
    case INT8: return narrow_stored<INT8>(row, dim, scale, zero, group, width, out);
    default: return narrow_stored<INT4>(row, dim, scale, zero, group, width, out);
  }
}

template <int32_t STORAGE>
static void pair_stored(const char* even, const char* odd, int64_t dim, const float* scale0, const float* zero0, const float* scale1,
                        const float* zero1, int64_t group, uint32_t* out) {
  stretches(dim, STORAGE == INT4, group, [&](int64_t d, int64_t end, int64_t n) {
    const float factor0 = scale0[n], shift0 = zero0 ? -zero0[n] * factor0 : 0.0f;
    const float factor1 = scale1[n], shift1 = zero1 ? -zero1[n] * factor1 : 0.0f;
    for (; d + LANES <= end; d += LANES) {
      vu low = (vu)(raw<STORAGE>(even, d, dim / 2) * factor0 + shift0) + 0x8000u;
      vu high = (vu)(raw<STORAGE>(odd, d, dim / 2) * factor1 + shift1) + 0x8000u;
      *reinterpret_cast<vu_any*>(out + d) = (low >> 16) | (high & 0xffff0000u);
    }
    for (; d < end; ++d)
      out[d] = narrow_one(read_code(even, d, dim, STORAGE, scale0, zero0, group)) |
               uint32_t(narrow_one(read_code(odd, d, dim, STORAGE, scale1, zero1, group))) << 16;
  });
}

// Two rows as one of pairs of bf16, zeros up to `width`; a missing row counts as zeros.
static void pair_codes(const char* even, const char* odd, int64_t dim, int32_t storage, const float* scale0, const float* zero0,
                       const float* scale1, const float* zero1, int64_t group, int64_t width, uint32_t* out) {
  if (storage == BF16 && even) {
    pair_rows(even, odd, dim, out);
  } else if (storage == INT8 && even && odd) {
    pair_stored<INT8>(even, odd, dim, scale0, zero0, scale1, zero1, group, out);
  } else if (storage == INT4 && even && odd) {
    pair_stored<INT4>(even, odd, dim, scale0, zero0, scale1, zero1, group, out);
  } else {
    for (int64_t e = 0; e < dim; ++e) {
      out[e] = even ? narrow_one(read_code(even, e, dim, storage, scale0, zero0, group)) : 0;
      if (odd) out[e] |= uint32_t(narrow_one(read_code(odd, e, dim, storage, scale1, zero1, group))) << 16;
    }
  }
  for (int64_t e = dim; e < width; ++e) out[e] = 0;
}

}  // namespace saccade::SACCADE_ISA
