// Products of queries with codes of 8 and 4 bits, as dot products of bytes: codes are never widened.
//
// What they meet is split into bytes too: queries into two signed pieces, 15 bits relative to the greatest of 64 channels;
// weights times scales into two unsigned ones, 16 bits relative to the greatest of a tile. Keys are turned so that their
// scores lie across the lanes and need no sums, values so that four tokens of a channel lie side by side. The sums are exact;
// scales and zero points are applied to them.
#pragma once
#include "decode_ahead.hpp"
#include "decode_rows.hpp"

namespace saccade::SACCADE_ISA {

#if defined(__AVX512VNNI__)
constexpr bool HAS_BYTE_DOT = true;
// acc + sums of four products of an unsigned and a signed byte
INLINE vi dot_bytes(vi acc, vi without_sign, vi with_sign) {
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)without_sign, (__m512i)with_sign);
}
// Four bytes for all lanes: straight from memory, which a product takes as it is.
INLINE vi spread_bytes(const void* p) { return (vi)_mm512_broadcastd_epi32(_mm_loadu_si32(p)); }
INLINE vi low_bytes(vi a, vi b) { return (vi)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
INLINE vi high_bytes(vi a, vi b) { return (vi)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }
INLINE vi low_pairs(vi a, vi b) { return (vi)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
INLINE vi high_pairs(vi a, vi b) { return (vi)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
#else
constexpr bool HAS_BYTE_DOT = false;
INLINE vi dot_bytes(vi acc, vi, vi) { return acc; }
INLINE vi spread_bytes(const void*) { return vi{}; }
INLINE vi low_bytes(vi a, vi) { return a; }
INLINE vi high_bytes(vi a, vi) { return a; }
INLINE vi low_pairs(vi a, vi) { return a; }
INLINE vi high_pairs(vi a, vi) { return a; }
#endif

constexpr int CODE_SPAN = 64;        // channels whose products are summed as integers: their codes have one scale
constexpr int MOST_CODE_SPANS = 8;   // of a row
constexpr int CODE_ROWS = 8;    // queries
constexpr float QUERY_STEPS = 127 * 128, WEIGHT_STEPS = 65535;

INLINE vi load_codes(const char* p) {
  typedef int32_t any __attribute__((vector_size(4 * SACCADE_LANES), aligned(1), may_alias));
  return *reinterpret_cast<const any*>(p);
}

// Rows whose codes are taken as they are: whole vectors of bytes, each of one scale.
INLINE bool fits_bytes(int64_t dim, int32_t storage, const Scales& scales) {
  if (!HAS_BYTE_DOT || scales.group % CODE_SPAN != 0 || dim / CODE_SPAN > MOST_CODE_SPANS) return false;
  return storage == INT8 ? dim % CODE_SPAN == 0 : storage == INT4 && dim % (2 * CODE_SPAN) == 0;
}

// Queries in pieces, and the scales of a tile by group.
struct CodeScratch {
  alignas(64) int8_t query[CODE_ROWS][2][MOST_CODE_SPANS * CODE_SPAN];  // high, low: high * 128 + low steps
  float step[CODE_ROWS][MOST_CODE_SPANS], total[CODE_ROWS][MOST_CODE_SPANS];  // of a span: what a step is, the sum in steps
  int32_t offset[CODE_ROWS][2][MOST_CODE_SPANS];                   // what the codes' own offset adds to the sums, negative
  alignas(64) float scale[MOST_CODE_SPANS][SLICE], zero[MOST_CODE_SPANS][SLICE];
  alignas(64) uint8_t weight[CODE_ROWS][MOST_CODE_SPANS][2][SLICE];
  float part[CODE_ROWS][MOST_CODE_SPANS], shift[CODE_ROWS][MOST_CODE_SPANS];  // what a step of a weight is; what zero points take off
  int32_t lift[CODE_ROWS][MOST_CODE_SPANS][2];
};

typedef int8_t v_bytes __attribute__((vector_size(SACCADE_LANES), aligned(1), may_alias));

INLINE int32_t sum_of_lanes(vi x) {
  int32_t sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
}

// One row of queries in fp32; false if it is not finite.
INLINE bool split_query(const float* row, int64_t dim, int offset, int r, CodeScratch& s) {
  for (int64_t n = 0; n < dim / CODE_SPAN; ++n) {
    const float* x = row + n * CODE_SPAN;
    vf sizes = {}, check = {};
    for (int d = 0; d < CODE_SPAN; d += LANES) {
      const vf y = load(x + d), size = y < 0.0f ? -y : y;
      sizes = size > sizes ? size : sizes;
      check += y * 0.0f;
    }
    if (sum_of_lanes(check) != 0) return false;
    const float most = highest_lane(sizes), per = most < 1e-30f ? 0.0f : QUERY_STEPS / most;
    vi sum[2] = {};
    for (int d = 0; d < CODE_SPAN; d += LANES) {
      const vf y = load(x + d) * per;
      const vi all = __builtin_convertvector(y + (y < 0.0f ? splat(-0.5f) : splat(0.5f)), vi), high = (all + 64) >> 7;
      const vi piece[2] = {high, all - high * 128};
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<v_bytes*>(s.query[r][i] + n * CODE_SPAN + d) = __builtin_convertvector(piece[i], v_bytes);
        sum[i] += piece[i];
      }
    }
    s.step[r][n] = most / QUERY_STEPS;
    for (int i = 0; i < 2; ++i) s.offset[r][i][n] = -offset * sum_of_lanes(sum[i]);
    s.total[r][n] = float(sum_of_lanes(sum[0]) * 128 + sum_of_lanes(sum[1]));
  }
  return true;
}

// Scales and zero points of `count` rows, by group; whether all are finite and no scale is negative.
INLINE bool turn_scales(const float* const* scale, const float* const* zero, bool zeros, int count, int64_t groups, CodeScratch& s) {
  vf check = {};
  for (int64_t g = 0; g < groups; ++g) {
    for (int j = 0; j < count; ++j) s.scale[g][j] = scale[j][g];
    for (int j = count; j % LANES; ++j) s.scale[g][j] = 0;
    for (int j = 0; zeros && j < count; ++j) s.zero[g][j] = zero[j][g];
    for (int j = count; zeros && j % LANES; ++j) s.zero[g][j] = 0;
    for (int j = 0; j < count; j += LANES) {
      const vf x = load(s.scale[g] + j);
      check += (x >= 0.0f ? x : splat(INF)) * 0.0f;
      if (zeros) check += load(s.zero[g] + j) * 0.0f;
    }
  }
  return sum_of_lanes(check) == 0;
}

// acc[r], over the keys of the lanes: the sums of span `n` with turned codes, their scales applied.
template <int R>
INLINE void add_span(const vi* codes, int64_t n, int64_t group, bool zeros, int first, int r, const CodeScratch& s, vf* acc,
                     Ahead& ahead) {
  vi sum[R][2];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) sum[i][0] = splat(s.offset[r + i][0][n]), sum[i][1] = splat(s.offset[r + i][1][n]);
#pragma GCC unroll 16
  for (int c = 0; c < LANES; ++c) {
    if (c % 4 == 0) ahead.step();
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int piece = 0; piece < 2; ++piece)
        sum[i][piece] = dot_bytes(sum[i][piece], codes[c], spread_bytes(s.query[r + i][piece] + n * CODE_SPAN + 4 * c));
  }
  const int64_t g = n * CODE_SPAN / group;
  const vf scale = load(s.scale[g] + first), zero = zeros ? load(s.zero[g] + first) : vf{};
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    const vf all = __builtin_convertvector(sum[i][0], vf) * 128.0f + __builtin_convertvector(sum[i][1], vf);
    acc[i] += (all - zero * s.total[r + i][n]) * (scale * s.step[r + i][n]);
  }
}

// out[i][j] = factor * query r + i . key j for R queries and `whole` keys; out's rows are SLICE apart.
template <int32_t STORAGE, int R>
INLINE void code_dots(const char* const* keys, int whole, int64_t dim, int64_t group, bool zeros, float factor, int r,
                      const CodeScratch& s, float* out, Ahead& ahead) {
  const int64_t bytes = STORAGE == INT8 ? dim : dim / 2, spans = bytes / CODE_SPAN;
  for (int first = 0; first < whole; first += LANES) {
    vf acc[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) acc[i] = vf{};
    for (int64_t n = 0; n < spans; ++n) {
      vf turned[LANES];
#pragma GCC unroll 16
      for (int j = 0; j < LANES; ++j) turned[j] = (vf)load_codes(keys[first + j] + n * CODE_SPAN);
      transpose(turned);
      vi codes[LANES];
      if constexpr (STORAGE == INT8) {
#pragma GCC unroll 16
        for (int c = 0; c < LANES; ++c) codes[c] = (vi)turned[c] ^ splat(int32_t(0x80808080));
        add_span<R>(codes, n, group, zeros, first, r, s, acc, ahead);
      } else {
#pragma GCC unroll 16
        for (int c = 0; c < LANES; ++c) codes[c] = (vi)turned[c] & splat(0x0f0f0f0f);
        add_span<R>(codes, n, group, zeros, first, r, s, acc, ahead);
#pragma GCC unroll 16
        for (int c = 0; c < LANES; ++c) codes[c] = ((vi)turned[c] >> 4) & splat(0x0f0f0f0f);
        add_span<R>(codes, spans + n, group, zeros, first, r, s, acc, ahead);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) store(out + i * SLICE + first, acc[i] * factor);
  }
}

// The weights [whole] of a row, times the scales of each group, in pieces; zeros up to a multiple of four.
INLINE void split_weights(const float* weights, int whole, int64_t groups, int offset, bool zeros, int r, CodeScratch& s) {
  for (int64_t g = 0; g < groups; ++g) {
    vf most = {}, shift = {};
    for (int j = 0; j < whole; j += LANES) {
      const vf x = load(weights + j) * load(s.scale[g] + j);
      most = x > most ? x : most;
      if (zeros) shift += x * load(s.zero[g] + j);
    }
    const float high = highest_lane(most);
    const vf per = splat(high < 1e-30f ? 0.0f : WEIGHT_STEPS / high);
    vi sum[2] = {};
    for (int j = 0; j < whole; j += LANES) {
      const vi all = __builtin_convertvector(load(weights + j) * load(s.scale[g] + j) * per + 0.5f, vi);
      const vi piece[2] = {all >> 8, all & 255};
      for (int i = 0; i < 2; ++i) {
        sum[i] += piece[i];
        *reinterpret_cast<v_bytes*>(s.weight[r][g][i] + j) = __builtin_convertvector(piece[i], v_bytes);
      }
    }
    s.part[r][g] = high / WEIGHT_STEPS;
    s.shift[r][g] = zeros ? sum_of_lanes(shift) : 0.0f;
    for (int i = 0; i < 2; ++i) s.lift[r][g][i] = -offset * sum_of_lanes(sum[i]);
  }
}

// out[i][channels of a span] += sums of the integers of row r + i: lane 4 l + c has channel 16 l + 4 `quarter` + c.
INLINE void add_quarter(vi high, vi low, float part, float shift, int quarter, float* out) {
  float sums[LANES];
  store(sums, (__builtin_convertvector(high, vf) * 256.0f + __builtin_convertvector(low, vf)) * part - shift);
  typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
  for (int l = 0; l < LANES / 4; ++l)
    *reinterpret_cast<v4*>(out + 16 * l + 4 * quarter) += *reinterpret_cast<const v4*>(sums + 4 * l);
}

// out[i] += sum over j of weights[r + i][j] * values[j] for R rows, `stride` apart; `count` is a multiple of four.
template <int32_t STORAGE, int R>
INLINE void code_values(const char* const* values, int count, int64_t dim, int64_t group, int r, const CodeScratch& s, float* out,
                        int64_t stride, Ahead& ahead) {
  constexpr int QUARTERS = STORAGE == INT8 ? 2 : 1;  // of a span's channels, whose sums fit the registers
  const int64_t bytes = STORAGE == INT8 ? dim : dim / 2, spans = bytes / CODE_SPAN;
  for (int64_t n = 0; n < spans; ++n) {
    const int64_t near = n * CODE_SPAN / group, far = STORAGE == INT8 ? near : (spans + n) * CODE_SPAN / group;
    for (int quarter = 0; quarter < 4; quarter += QUARTERS) {
      vi sum[R][2][2];  // row; quarter, or half of the row; piece
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int piece = 0; piece < 2; ++piece) {
          sum[i][0][piece] = splat(s.lift[r + i][near][piece]);
          sum[i][1][piece] = splat(s.lift[r + i][far][piece]);
        }
      for (int j = 0; j < count; j += 4) {
        ahead.step();
        vi x[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) x[k] = load_codes(values[j + k] + n * CODE_SPAN);
        const bool upper = quarter >= 2;
        const vi even = upper ? high_bytes(x[0], x[1]) : low_bytes(x[0], x[1]);
        const vi odd = upper ? high_bytes(x[2], x[3]) : low_bytes(x[2], x[3]);
        vi codes[2];
        if constexpr (STORAGE == INT8) {
          codes[0] = low_pairs(even, odd);
          codes[1] = high_pairs(even, odd);
        } else {
          const vi both = quarter & 1 ? high_pairs(even, odd) : low_pairs(even, odd);
          codes[0] = both & splat(0x0f0f0f0f);
          codes[1] = (both >> 4) & splat(0x0f0f0f0f);
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
          for (int piece = 0; piece < 2; ++piece) {
            const vi first = spread_bytes(s.weight[r + i][near][piece] + j);
            const vi second = STORAGE == INT8 ? first : spread_bytes(s.weight[r + i][far][piece] + j);
            sum[i][0][piece] = dot_bytes(sum[i][0][piece], first, codes[0]);
            sum[i][1][piece] = dot_bytes(sum[i][1][piece], second, codes[1]);
          }
      }
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        float* into = out + i * stride + n * CODE_SPAN;
        const int64_t half = STORAGE == INT8 ? 0 : dim / 2;
        add_quarter(sum[i][0][0], sum[i][0][1], s.part[r + i][near], s.shift[r + i][near], quarter, into);
        add_quarter(sum[i][1][0], sum[i][1][1], s.part[r + i][far], s.shift[r + i][far], quarter + (half ? 0 : 1), into + half);
      }
    }
  }
}

}  // namespace saccade::SACCADE_ISA
