// The inner products of attention, on a panel of queries that lie across the lanes of two vectors.
//
// Everything is held transposed, [key][query] and [channel][query], so that softmax needs no sums across lanes, and keys
// and values are read in place, an element at a time, each for a whole panel. The same code serves fp32 and pairs of bf16:
// both are 32-bit elements, an operator says how two are multiplied.
#pragma once
#include "simd.hpp"

namespace saccade::SACCADE_ISA {

constexpr int PANEL = 2 * LANES;                // queries of a panel
constexpr int TILE = 64;                        // keys of a tile
constexpr int BLOCK = LANES == 16 ? 8 : 4;      // rows of accumulators that fit the registers

struct Single {
  typedef float element;
  static constexpr int PER_ELEMENT = 1;
  INLINE vf multiply(vf acc, float a, const float* b) { return acc + a * load(b); }
};

struct Pairs {  // two bf16 in an element, which may lie at any even address
  typedef uint32_t element __attribute__((aligned(2), may_alias));
  static constexpr int PER_ELEMENT = 2;
  INLINE vf multiply(vf acc, uint32_t a, const uint32_t* b) {
    return dot_bf16(acc, a - vu{}, *reinterpret_cast<const vu_any*>(b));
  }
};

// out[row][query] = sum over d of rows[row][d] * columns[d][query]
template <class Op, int R>
INLINE void product_rows(const typename Op::element* const* rows, const typename Op::element* columns, int depth, float* out) {
  vf acc[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = vf{};
  for (int d = 0; d < depth; ++d, columns += PANEL) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      acc[r][0] = Op::multiply(acc[r][0], rows[r][d], columns);
      acc[r][1] = Op::multiply(acc[r][1], rows[r][d], columns + LANES);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    store(out + r * PANEL, acc[r][0]);
    store(out + r * PANEL + LANES, acc[r][1]);
  }
}

template <class Op>
INLINE void product(const typename Op::element* const* rows, int count, const typename Op::element* columns, int depth, float* out) {
  int r = 0;
  for (; r + BLOCK <= count; r += BLOCK) product_rows<Op, BLOCK>(rows + r, columns, depth, out + r * PANEL);
  for (; r < count; ++r) product_rows<Op, 1>(rows + r, columns, depth, out + r * PANEL);
}

// out[channel][query] = out[channel][query] * factor[query] + sum over rows of rows[row][channel] * weights[row][query]
template <class Op, int R>
INLINE void accumulate_channels(const typename Op::element* const* rows, int count, int channel,
                                const typename Op::element* weights, const vf* factor, float* out) {
  vf acc[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    acc[r][0] = load(out + r * PANEL) * factor[0];
    acc[r][1] = load(out + r * PANEL + LANES) * factor[1];
  }
  for (int j = 0; j < count; ++j, weights += PANEL) {
    const typename Op::element* row = rows[j] + channel;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      acc[r][0] = Op::multiply(acc[r][0], row[r], weights);
      acc[r][1] = Op::multiply(acc[r][1], row[r], weights + LANES);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    store(out + r * PANEL, acc[r][0]);
    store(out + r * PANEL + LANES, acc[r][1]);
  }
}

template <class Op>
INLINE void accumulate(const typename Op::element* const* rows, int count, int channels,
                       const typename Op::element* weights, const vf* factor, float* out) {
  int e = 0;
  for (; e + BLOCK <= channels; e += BLOCK) accumulate_channels<Op, BLOCK>(rows, count, e, weights, factor, out + e * PANEL);
  for (; e < channels; ++e) accumulate_channels<Op, 1>(rows, count, e, weights, factor, out + e * PANEL);
}

// Online softmax of one vector of queries: scores [count][PANEL] become weights, top and sum move on.
// Returns the factor by which what was summed before shrinks.
INLINE vf soften(float* scores, int count, float scale, vf* top, vf* sum) {
  vf high = *top;
  for (int j = 0; j < count; ++j) {
    vf s = load(scores + j * PANEL);
    high = s > high ? s : high;
  }
  vf shift = (high == -INF ? vf{} : high) * scale;  // nothing visible yet: any finite shift keeps weights 0
  vf factor = exp2v(*top * scale - shift);
  vf total = *sum * factor;
  for (int j = 0; j < count; ++j) {
    vf weight = exp2v(load(scores + j * PANEL) * scale - shift);
    store(scores + j * PANEL, weight);
    total += weight;
  }
  *top = high;
  *sum = total;
  return factor;
}

}  // namespace saccade::SACCADE_ISA
