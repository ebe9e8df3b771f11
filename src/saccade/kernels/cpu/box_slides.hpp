// Products between a row of tokens across the lanes and rows of the other side, held transposed: the j-th column that each
// lane sees is one vector, which moves with j.
#pragma once
#include "problem_boxes.hpp"
#include "simd.hpp"

namespace saccade::SACCADE_ISA {

constexpr int ROW_GROUP = LANES == 16 ? 3 : 2;  // rows that share what is read, and columns that are worked on at a time:
constexpr int ROW_SPAN = LANES == 16 ? 7 : 4;   // their product accumulators fit the registers

// What the lanes of a tile see along the last axis.
struct Window {
  int64_t base;       // column of the ring that the first lane sees first
  int longest;        // columns that a lane sees, at most
  bool even;          // all lanes see as many
  bool straight;      // and each from one column further than the lane before
  bool near;          // first columns differ by less than a vector
  vi place, length;   // first column of each lane, from `base`; how many it sees
};

// How to take the j-th column of each lane from `column`, that of the first lane; 0 where a lane sees fewer.
struct Straight {
  INLINE vf take(const float* column, int) { return load(column); }
};

struct Bent {
  vi place;
  vf take(const float* column, int) const { return __builtin_shuffle(load(column), place); }
};

struct Uneven {
  vi place, length;
  vf take(const float* column, int j) const {
    vf x = __builtin_shuffle(load(column), place);
    return splat(j) < length ? x : vf{};
  }
};

struct Scattered {
  vi place, length;
  vf take(const float* column, int j) const {
    vf x = {};
    for (int i = 0; i < LANES; ++i)
      if (j < length[i]) x[i] = column[place[i]];
    return x;
  }
};

// A row of the other side from where the first lane sees it: [channels][width].
struct Slid {
  const float* columns;
  int64_t width;
  int channels, length;
};

// out[r][j][lane] = sum over channels of mine[r][channel][lane] * (the j-th column of the lane)[channel]
template <int R, int J, class Take>
INLINE void slide_product(const Slid& other, int from, const Take& take, const float* mine, int64_t apart, float* out,
                          int64_t out_apart) {
  vf acc[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) acc[r][j] = vf{};
  const float* columns = other.columns + from;
  for (int d = 0; d < other.channels; ++d, columns += other.width, mine += LANES) {
    vf row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = load(mine + r * apart);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      vf x = take.take(columns + j, from + j);
      if constexpr (R > 1) x = hold(x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][j] += row[r] * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) store(out + r * out_apart + (from + j) * LANES, acc[r][j]);
}

// out[r][channel][lane] += sum over j of weights[r][j][lane] * (the j-th column of the lane)[channel]
template <int R, int J, class Take>
INLINE void slide_accumulate(const Slid& other, int from, const Take& take, const float* weights, int64_t apart, float* out,
                             int64_t out_apart) {
  vf weight[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) weight[r][j] = load(weights + r * apart + (from + j) * LANES);
  const float* columns = other.columns + from;
  for (int e = 0; e < other.channels; ++e, columns += other.width, out += LANES) {
    vf acc[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = load(out + r * out_apart);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      vf x = take.take(columns + j, from + j);
      if constexpr (R > 1) x = hold(x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] += weight[r][j] * x;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(out + r * out_apart, acc[r]);
  }
}

// Calls work<J>(from) for runs of J columns that make up `length`.
template <class Work>
INLINE void in_spans(int length, const Work& work) {
  int from = 0;
  for (; from + ROW_SPAN <= length; from += ROW_SPAN) work.template operator()<ROW_SPAN>(from);
  if constexpr (ROW_SPAN > 5)
    for (; from + 5 <= length; from += 5) work.template operator()<5>(from);
  for (; from + 3 <= length; from += 3) work.template operator()<3>(from);
  for (; from < length; ++from) work.template operator()<1>(from);
}

template <int R, class Take>
static void slide_products(const Slid& other, const Take& take, const float* mine, int64_t apart, float* out, int64_t out_apart) {
  in_spans(other.length, [&]<int J>(int from) __attribute__((always_inline)) {
    slide_product<R, J>(other, from, take, mine, apart, out, out_apart);
  });
}

template <int R, class Take>
static void slide_sums(const Slid& other, const Take& take, const float* weights, int64_t apart, float* out, int64_t out_apart) {
  in_spans(other.length, [&]<int J>(int from) __attribute__((always_inline)) {
    slide_accumulate<R, J>(other, from, take, weights, apart, out, out_apart);
  });
}

template <class Work>
INLINE void with_rows(int count, const Work& work) {
  if (count == 1) work.template operator()<1>();
  if (count == 2) work.template operator()<2>();
  if constexpr (ROW_GROUP > 2)
    if (count == 3) work.template operator()<3>();
}

template <class Work>
INLINE void with_take(const Window& window, const Work& work) {
  if (window.straight) return work(Straight{});
  if constexpr (LANES > 4)  // a shuffle by variable places is one instruction
    if (window.near) return window.even ? work(Bent{window.place}) : work(Uneven{window.place, window.length});
  work(Scattered{window.place, window.length});
}

}  // namespace saccade::SACCADE_ISA
