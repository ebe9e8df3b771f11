// Vectors of SACCADE_LANES floats, for whatever instruction set this file is compiled for. Only what needs a special
// instruction is written with intrinsics; the compiler's vector extension does the rest. No header of the standard
// library's templates may be used here: the linker would keep one copy of them, for the wrong instruction set.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace saccade::SACCADE_ISA {

constexpr int LANES = SACCADE_LANES;
typedef float vf __attribute__((vector_size(4 * SACCADE_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * SACCADE_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * SACCADE_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * SACCADE_LANES)));
typedef float vf_any __attribute__((vector_size(4 * SACCADE_LANES), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * SACCADE_LANES), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * SACCADE_LANES), aligned(2), may_alias));

constexpr float INF = __builtin_inff();

INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
// x, from here on in a register: left to itself the compiler reads it again from memory for every use.
INLINE vf hold(vf x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#endif
  return x;
}

INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat(int32_t x) { return x - vi{}; }

INLINE vf exp2_polynomial(vf f) {
  vf p = splat(1.546144746e-4f);  // minimax for (2^f - 1) / f on [-1/2, 1/2]: 5e-9
  p = p * f + 1.339086735e-3f;
  p = p * f + 9.618056670e-3f;
  p = p * f + 5.550357104e-2f;
  p = p * f + 2.402265092e-1f;
  p = p * f + 6.931471880e-1f;
  return p * f + 1.0f;
}

// 2^x to the last bit but one; 0 below -126, NaN stays NaN.
INLINE vf exp2v(vf x) {
#if defined(__AVX512F__)
  const __m512 y = (__m512)x, whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __mmask16 normal = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)exp2_polynomial(x - (vf)whole), whole);
#else
  const vf low = splat(-150.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf y = x < low ? low : x;
  vf shifted = y + magic;
  vf f = y - (shifted - magic);
  vf scaled = (vf)((vi)exp2_polynomial(f) + ((vi)shifted << 23));
  return x < -126.0f ? vf{} : scaled;
#endif
}

// Natural logarithm to about the last bit, for normal numbers; NaN and infinity give NaN.
INLINE vf logv(vf x) {
  vi exponent = ((vi)x - 0x3f3504f3) >> 23;  // x = m * 2^exponent with m in [sqrt(1/2), sqrt(2))
  vf m = (vf)((vi)x - (exponent << 23));
  vf s = (m - 1.0f) / (m + 1.0f), square = s * s;  // log m = 2 artanh s, by its series
  vf p = splat(2.0f / 9.0f);
  p = p * square + 2.0f / 7.0f;
  p = p * square + 2.0f / 5.0f;
  p = p * square + 2.0f / 3.0f;
  p = p * square + 2.0f;
  return p * s + __builtin_convertvector(exponent, vf) * 0.693147181f + x * 0.0f;
}

// Left to itself the compiler widens 16 elements in two halves.
INLINE vu widen_bits(vh x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}

INLINE vf widen_bf16(vh x) { return (vf)(widen_bits(x) << 16); }

// The greatest lane, and the sum of all: in halves, so that few steps follow each other.
INLINE float highest_lane(vf x) {
  vi lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2) {
    vf other = __builtin_shuffle(x, lane ^ half);
    x = other > x ? other : x;
  }
  return x[0];
}

INLINE float sum_of_lanes(vf x) {
  vi lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2) x += __builtin_shuffle(x, lane ^ half);
  return x[0];
}

// fp16 to fp32, subnormals, infinities and NaN included.
INLINE vf widen_fp16(vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)x);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  vu h = __builtin_convertvector(x, vu);
  vu sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  vf value = (vf)rest * 0x1p112f;  // moves the exponent's bias; exact, also for subnormals
  vu bits = (vu)value;
  bits = (h & 0x7c00u) == 0x7c00u ? (rest | 0x7f800000u) : bits;
  return (vf)(bits | sign);
#endif
}

// acc + (pairs of bf16) . (pairs of bf16), in fp32.
#if defined(__AVX512BF16__)
constexpr bool HAS_BF16_DOT = true;
INLINE vf dot_bf16(vf acc, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#else
constexpr bool HAS_BF16_DOT = false;
INLINE vf dot_bf16(vf acc, vu a, vu b) {
  return acc + (vf)(a << 16) * (vf)(b << 16) + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
}
#endif

// Two rows of floats rounded to bf16 and interleaved: lane i holds (even[i], odd[i]).
INLINE vu pair_bf16(vf even, vf odd) {
#if defined(__AVX512BF16__)
  vu place;
  for (int i = 0; i < LANES; ++i) place[i] = uint32_t(i) | uint32_t(LANES + i) << 16;
  return (vu)_mm512_permutexvar_epi16((__m512i)place, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
  vu e = (vu)even, o = (vu)odd;
  e += 0x7fffu + ((e >> 16) & 1u);
  o += 0x7fffu + ((o >> 16) & 1u);
  return (e >> 16) | (o & 0xffff0000u);
#endif
}

// Floats rounded to bf16.
INLINE vh narrow_bf16(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(pair_bf16(x, vf{}), vh);
#endif
}

template <int S>
INLINE void exchange(vf* x) {  // blocks of S x S off the diagonal change places
  vi low, high;
  for (int i = 0; i < LANES; ++i) {
    low[i] = i & S ? i - S + LANES : i;
    high[i] = i & S ? i + LANES : i + S;
  }
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) {
    if (r & S) continue;
    vf a = x[r], b = x[r + S];
#if defined(__clang__)
    for (int i = 0; i < LANES; ++i) {
      x[r][i] = low[i] < LANES ? a[low[i]] : b[low[i] - LANES];
      x[r + S][i] = high[i] < LANES ? a[high[i]] : b[high[i] - LANES];
    }
#else
    x[r] = __builtin_shuffle(a, b, low);
    x[r + S] = __builtin_shuffle(a, b, high);
#endif
  }
}

// LANES x LANES, in place.
INLINE void transpose(vf* x) {
#if defined(__AVX512F__)
  // Within 128 bits first: those instructions need no register that says what goes where, and take less of the ports.
  vf y[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]), b = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
    const __m512 c = _mm512_unpacklo_ps((__m512)x[i + 2], (__m512)x[i + 3]), d = _mm512_unpackhi_ps((__m512)x[i + 2], (__m512)x[i + 3]);
    y[i] = (vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)c);
    y[i + 1] = (vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)c);
    y[i + 2] = (vf)_mm512_unpacklo_pd((__m512d)b, (__m512d)d);
    y[i + 3] = (vf)_mm512_unpackhi_pd((__m512d)b, (__m512d)d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4((__m512)y[i], (__m512)y[i + 4], 0x88), b = _mm512_shuffle_f32x4((__m512)y[i], (__m512)y[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4((__m512)y[i + 8], (__m512)y[i + 12], 0x88), d = _mm512_shuffle_f32x4((__m512)y[i + 8], (__m512)y[i + 12], 0xdd);
    x[i] = (vf)_mm512_shuffle_f32x4(a, c, 0x88);
    x[i + 8] = (vf)_mm512_shuffle_f32x4(a, c, 0xdd);
    x[i + 4] = (vf)_mm512_shuffle_f32x4(b, d, 0x88);
    x[i + 12] = (vf)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
#else
  exchange<1>(x);
  exchange<2>(x);
  if constexpr (LANES > 4) exchange<4>(x);
  if constexpr (LANES > 8) exchange<8>(x);
#endif
}

}  // namespace saccade::SACCADE_ISA
