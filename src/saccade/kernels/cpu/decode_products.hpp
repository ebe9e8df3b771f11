// Products of few queries with rows of keys, and sums of weighed rows of values.
#pragma once
#include "codes.hpp"
#include "decode_ahead.hpp"
#include "decode_rows.hpp"

namespace saccade::SACCADE_ISA {



// A row of `depth` >= LANES elements is covered by whole vectors; the last one may overlap the one before.
INLINE int vectors(int64_t depth) { return int((depth + LANES - 1) / LANES); }
INLINE int64_t place(int64_t depth, int v) { return (v + 1) * LANES <= depth ? v * LANES : depth - LANES; }
INLINE int64_t padded(int64_t depth) { return (depth + LANES - 1) / LANES * LANES; }

struct Floats {
  typedef float element;
  typedef vf vector;
  static constexpr int PER_ELEMENT = 1;
  INLINE vf take(const float* p) { return load(p); }
  INLINE vf spread(float x) { return splat(x); }
  INLINE vf multiply(vf acc, vf a, vf b) { return acc + a * b; }
};

struct HalfPairs {
  typedef uint32_t element;
  typedef vu vector;
  static constexpr int PER_ELEMENT = 2;
  INLINE vu take(const uint32_t* p) { return *reinterpret_cast<const vu_half*>(p); }
  INLINE vu spread(uint32_t x) { return x - vu{}; }
  INLINE vf multiply(vf acc, vu a, vu b) { return dot_bf16(acc, a, b); }
};

// Lane i: the sum over the lanes of acc[i]. Steps are template instances: of a loop the compiler would keep acc in memory.
template <int HALF = LANES / 2>
INLINE vf sums_of(vf* acc) {
  vi upper, other;  // the partner lane, of the second vector where `upper`
  for (int i = 0; i < LANES; ++i) {
    upper[i] = i & HALF ? -1 : 0;
    other[i] = (i ^ HALF) + (i & HALF ? LANES : 0);
  }
#pragma GCC unroll 8
  for (int i = 0; i < HALF; ++i) {
    vf a = acc[i], b = acc[i + HALF];
    acc[i] = (upper ? b : a) + __builtin_shuffle(a, b, other);
  }
  if constexpr (HALF > 1)
    return sums_of<HALF / 2>(acc);
  else
    return acc[0];
}

// Rows of keys or values as the products want them: row(j).take(at, v) is vector v, which begins at element `at`.
template <class Op>
struct Ready {
  const typename Op::element* const* rows;
  struct Row {
    const typename Op::element* data;
    __attribute__((always_inline)) typename Op::vector take(int64_t at, int) const { return Op::take(data + at); }
  };
  __attribute__((always_inline)) Row row(int j) const { return {rows[j]}; }
};

// Rows that are widened on the way; codes without zero points.
template <int32_t STORAGE>
struct Narrow {
  const char* const* rows;
  const float* const* scale;
  int64_t half;          // channels in a half of the row
  const uint8_t* group;  // of each vector
  struct Row {
    const char* data;
    const float* scale;
    int64_t half;
    const uint8_t* group;
    __attribute__((always_inline)) vf take(int64_t at, int v) const {
      vf x = raw<STORAGE>(data, at, half);
      return STORAGE == INT8 || STORAGE == INT4 ? x * scale[group[v]] : x;
    }
  };
  __attribute__((always_inline)) Row row(int j) const { return {rows[j], scale[j], half, group}; }
};

// out[r][j] = scale * queries[r] . keys[first + j] for R queries and LANES / R keys.
template <class Op, int R, class Source>
INLINE void dots(const Source& keys, int first, const typename Op::element* queries, int64_t depth, float scale, float* out,
                 Ahead& ahead) {
  constexpr int KEYS = LANES / R;
  const int count = vectors(depth);
  vf acc[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) acc[i] = vf{};
  typename Source::Row row[KEYS];
#pragma GCC unroll 16
  for (int j = 0; j < KEYS; ++j) row[j] = keys.row(first + j);
  for (int s = 0; s < count; ++s) {
    const int64_t at = place(depth, s);
    ahead.step();
    typename Op::vector key[KEYS];
#pragma GCC unroll 16
    for (int j = 0; j < KEYS; ++j) key[j] = row[j].take(at, s);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      typename Op::vector query = Op::take(queries + r * int64_t(count) * LANES + s * LANES);
#pragma GCC unroll 16
      for (int j = 0; j < KEYS; ++j) acc[r * KEYS + j] = Op::multiply(acc[r * KEYS + j], key[j], query);
    }
  }
  float sums[LANES];
  store(sums, sums_of(acc) * scale);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) __builtin_memcpy(out + r * SLICE, sums + r * KEYS, KEYS * sizeof(float));
}

// out[r] = out[r] * factor[r] + sum over j of weights[r][j] * values[j], on V vectors of channels from the `first` on.
template <class Op, int R, int V, class Source>
INLINE void weigh(const Source& values, int count, int64_t depth, int first, const typename Op::element* weights,
                  const float* factor, float* out, Ahead& ahead) {
  const int64_t stride = int64_t(vectors(depth)) * LANES;
  vf acc[R][V];
  int64_t at[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) at[v] = place(depth, first + v);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = load(out + r * stride + (first + v) * LANES) * factor[r];
  for (int j = 0; j < count; ++j) {
    ahead.step();
    const typename Source::Row row = values.row(j);
    typename Op::vector value[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) value[v] = row.take(at[v], first + v);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      typename Op::vector weight = Op::spread(weights[r * SLICE / Op::PER_ELEMENT + j]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = Op::multiply(acc[r][v], weight, value[v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + r * stride + (first + v) * LANES, acc[r][v]);
}

// Two rows of 2 * LANES bf16 as two vectors of pairs.
INLINE void pair_wide(const uint32_t* even, const uint32_t* odd, vu* pairs) {
  typedef uint16_t vw __attribute__((vector_size(4 * LANES)));
  typedef uint16_t vw_any __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
  vw low, high;
  for (int i = 0; i < LANES; ++i) {
    low[2 * i] = uint16_t(i);
    low[2 * i + 1] = uint16_t(i + 2 * LANES);
    high[2 * i] = uint16_t(i + LANES);
    high[2 * i + 1] = uint16_t(i + 3 * LANES);
  }
  vw a = *reinterpret_cast<const vw_any*>(even), b = *reinterpret_cast<const vw_any*>(odd);
  pairs[0] = (vu)__builtin_shuffle(a, b, low);
  pairs[1] = (vu)__builtin_shuffle(a, b, high);
}

// As weigh, of rows of bf16 that are paired on the way, two by two; `depth` is a multiple of 2 * LANES.
template <int R, int V>
INLINE void weigh_halves(const uint32_t* const* values, int count, int64_t depth, int first, const uint32_t* weights,
                         const float* factor, float* out, Ahead& ahead) {
  vf acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = load(out + r * depth + (first + v) * LANES) * factor[r];
  for (int j = 0; j < count; ++j) {
    ahead.step();
    vu value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 2)
      pair_wide(values[2 * j] + (first + v) * LANES / 2, values[2 * j + 1] + (first + v) * LANES / 2, value + v);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vu weight = weights[r * SLICE / 2 + j] - vu{};
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = dot_bf16(acc[r][v], weight, value[v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + r * depth + (first + v) * LANES, acc[r][v]);
}

template <int R>
INLINE void weigh_all_halves(const uint32_t* const* values, int count, int64_t depth, const uint32_t* weights,
                             const float* factor, float* out, Ahead& ahead) {
  const int all = int(depth / LANES);
  int v = 0;
  for (; v + 4 <= all; v += 4) weigh_halves<R, 4>(values, count, depth, v, weights, factor, out, ahead);
  for (; v < all; v += 2) weigh_halves<R, 2>(values, count, depth, v, weights, factor, out, ahead);
}

// Vectors of channels whose sums for R queries fit the registers.
constexpr int most_vectors(int R) { return LANES == 16 ? (R == 4 ? 4 : 8) : 8 / R; }

template <class Op, int R, class Source>
INLINE void weigh_all(const Source& values, int count, int64_t depth, const typename Op::element* weights, const float* factor,
                      float* out, Ahead& ahead) {
  constexpr int MOST = most_vectors(R);
  const int all = vectors(depth);
  int v = 0;
  for (; v + MOST <= all; v += MOST) weigh<Op, R, MOST>(values, count, depth, v, weights, factor, out, ahead);
  if constexpr (MOST > 4)
    for (; v + 4 <= all; v += 4) weigh<Op, R, 4>(values, count, depth, v, weights, factor, out, ahead);
  if constexpr (MOST > 2)
    for (; v + 2 <= all; v += 2) weigh<Op, R, 2>(values, count, depth, v, weights, factor, out, ahead);
  for (; v < all; ++v) weigh<Op, R, 1>(values, count, depth, v, weights, factor, out, ahead);
}

}  // namespace saccade::SACCADE_ISA
