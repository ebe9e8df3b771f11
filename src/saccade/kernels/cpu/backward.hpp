// Gradients of softmax attention in one pass: a unit is a span of keys of one key/value head, and meets all queries that
// see them. With P = exp(S - lse) and dP = grad_out V^T, dS = P * (dP - delta) and
//   dV = P^T grad_out      dK = scale dS^T Q      dQ = scale dS K
// Gradients of keys and values stay with the unit. Those of queries are summed in memory over the spans, in their order:
// for each step (a block of queries) a unit waits until the unit of the span before it has added its part.
#pragma once
#include "problem_backward.hpp"
#include "rows.hpp"
#include "scores.hpp"

namespace saccade::SACCADE_ISA {

constexpr int STEP = 64;  // queries of a step, at most
constexpr int STEP_PANELS = STEP / PANEL;

// Row strides are an odd number of vectors, so that rows in succession fall into different sets of the cache.
INLINE int64_t stride_for(int64_t elements) { return ((elements + LANES - 1) / LANES | 1) * LANES; }

// out[r][c] += sum over t of a[r * ROW + t * NEXT] * b[t * b_stride + c]
template <class Op, int ROW, int NEXT, int R, int V>
INLINE void add_block(const typename Op::element* a, const typename Op::element* b, int64_t b_stride, int depth,
                      float* out, int64_t out_stride) {
  vf acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < V; ++c) acc[r][c] = load(out + r * out_stride + c * LANES);
  for (int t = 0; t < depth; ++t, a += NEXT, b += b_stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < V; ++c) acc[r][c] = Op::multiply(acc[r][c], a[r * ROW], b + c * LANES);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < V; ++c) store(out + r * out_stride + c * LANES, acc[r][c]);
}

template <class Op, int ROW, int NEXT, int V>
INLINE void add_columns(const typename Op::element* a, int rows, const typename Op::element* b, int64_t b_stride, int depth,
                        float* out, int64_t out_stride) {
  int r = 0;
  for (; r + BLOCK <= rows; r += BLOCK)
    add_block<Op, ROW, NEXT, BLOCK, V>(a + r * ROW, b, b_stride, depth, out + r * out_stride, out_stride);
  for (; r < rows; ++r) add_block<Op, ROW, NEXT, 1, V>(a + r * ROW, b, b_stride, depth, out + r * out_stride, out_stride);
}

// The above for all rows, and columns up to the next multiple of LANES.
template <class Op, int ROW, int NEXT>
static void add_product(const typename Op::element* a, int rows, const typename Op::element* b, int64_t b_stride, int depth,
                        int64_t columns, float* out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + LANES < columns; c += PANEL) add_columns<Op, ROW, NEXT, 2>(a, rows, b + c, b_stride, depth, out + c, out_stride);
  if (c < columns) add_columns<Op, ROW, NEXT, 1>(a, rows, b + c, b_stride, depth, out + c, out_stride);
}

// A row as the engine multiplies it: fp32, or bf16 whose pairs are elements; zeros up to a multiple of LANES elements.
INLINE void take_row(const char* row, int64_t dim, int32_t storage, float* out) {
  if (storage == FP32)
    __builtin_memcpy(out, row, dim * 4);
  else
    widen_row(row, dim, storage, out);
  for (int64_t d = dim; d < round_up(dim, LANES); ++d) out[d] = 0;
}

INLINE void take_row(const char* row, int64_t dim, int32_t storage, uint32_t* out) {
  if (storage == FP32) {
    const float* wide = reinterpret_cast<const float*>(row);
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) *reinterpret_cast<vh_any*>(out + d / 2) = narrow_bf16(load(wide + d));
    for (; d < dim; d += 2) out[d / 2] = pair_bf16(splat(wide[d]), splat(wide[d + 1]))[0];
  } else {
    __builtin_memcpy(out, row, dim * 2);
  }
  for (int64_t d = dim / 2; d < round_up(dim / 2, LANES); ++d) out[d] = 0;
}

// Exchanges the bits S of the places of lanes and rows.
template <int S>
INLINE void exchange(vu* rows) {
  vi lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  const vi low = (lane & S) != 0 ? lane + (LANES - S) : lane, high = (lane & S) != 0 ? lane + LANES : lane + S;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & S)) {
      vu a = rows[i], b = rows[i + S];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + S] = __builtin_shuffle(a, b, high);
    }
}

// PANEL rows of `depth` 32-bit elements, which lie `stride` apart, to out [depth][PANEL]; depth a multiple of LANES.
static void transpose(const void* from, int64_t stride, int64_t depth, void* to) {
  const uint32_t* rows = static_cast<const uint32_t*>(from);
  uint32_t* out = static_cast<uint32_t*>(to);
  for (int q = 0; q < PANEL; q += LANES)
    for (int64_t d = 0; d < depth; d += LANES) {
      vu square[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) square[i] = *reinterpret_cast<const vu_any*>(rows + (q + i) * stride + d);
      exchange<1>(square);
      exchange<2>(square);
      if constexpr (LANES > 4) exchange<4>(square);
      if constexpr (LANES > 8) exchange<8>(square);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) *reinterpret_cast<vu_any*>(out + (d + i) * PANEL + q) = square[i];
    }
}

// delta of rows first .. first + count - 1.
static void backward_delta(const AttentionBackward& p, int64_t b, int64_t h, int64_t first, int64_t count) {
  const int64_t dim = p.forward.value_dim;
  auto wide = [](const char* row, int64_t e, int32_t storage) {
    if (storage == FP32) return load(reinterpret_cast<const float*>(row) + e);
    vh half = *reinterpret_cast<const vh_any*>(reinterpret_cast<const uint16_t*>(row) + e);
    return storage == BF16 ? widen_bf16(half) : widen_fp16(half);
  };
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t place = (b * p.forward.heads + h) * p.forward.queries + i;
    const char *out = row_of(p.out, b, h, i, p.out_storage), *grad = row_of(p.grad_out, b, h, i, p.grad_storage);
    vf sums = {};
    int64_t e = 0;
    for (; e + LANES <= dim; e += LANES) sums += wide(out, e, p.out_storage) * wide(grad, e, p.grad_storage);
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    for (; e < dim; ++e) sum += read(out, e, p.out_storage) * read(grad, e, p.grad_storage);
    if (p.grad_lse) sum -= p.grad_lse[place];
    p.delta[place] = p.forward.lse[place] == -INF ? 0.0f : sum;
  }
}

template <class Op>
struct BackwardScratch {
  typedef typename Op::element element;
  element *keys, *values;          // [span][stride], rows as `take_row` makes them
  element* key_pairs;              // [span / 2][stride], pairs only: two keys in an element
  float *dkeys, *dvalues;          // [span][stride]
  element *queries, *grads;        // [STEP][stride]
  element *query_pairs, *grad_pairs;    // [STEP / 2][stride], pairs only
  element *query_panels, *grad_panels;  // [STEP_PANELS][depth][PANEL]
  element *weights, *dscores;      // [TILE][STEP], or pairs of queries [TILE][STEP / 2]
  element* dscore_pairs;           // [TILE / 2][STEP], pairs only: of keys
  float* dqueries;                 // [STEP][stride]
  float *lse, *delta;              // [STEP], lse to base 2

  // Lays it out at `memory` (64-byte aligned); returns the bytes, also for null.
  int64_t lay_out(const Attention& p, int64_t span, char* memory) {
    constexpr int64_t PER = Op::PER_ELEMENT;
    int64_t used = 0;
    auto take = [&](auto*& place, int64_t elements) {
      place = reinterpret_cast<__decltype(+place)>(memory + used);
      used += (elements * 4 + 63) / 64 * 64;
    };
    const int64_t q = stride_for(p.dim / PER), v = stride_for(p.value_dim / PER);
    const int64_t dq = stride_for(p.dim), dv = stride_for(p.value_dim);
    take(keys, span * q), take(values, span * v), take(dkeys, span * dq), take(dvalues, span * dv);
    take(queries, STEP * q), take(grads, STEP * v);
    take(query_panels, STEP * round_up(p.dim / PER, LANES)), take(grad_panels, STEP * round_up(p.value_dim / PER, LANES));
    take(weights, TILE * STEP / PER), take(dscores, TILE * STEP / PER);
    take(dqueries, STEP * dq), take(lse, STEP), take(delta, STEP);
    key_pairs = query_pairs = grad_pairs = dscore_pairs = nullptr;
    if (PER == 2) {
      take(key_pairs, (span + 1) / 2 * dq), take(query_pairs, STEP / 2 * dq), take(grad_pairs, STEP / 2 * dv);
      take(dscore_pairs, TILE / 2 * STEP);
    }
    return used;
  }
};

// The gradients of keys first .. first + count - 1 of a key/value head, which is number `unit` of `turns`.
template <class Op>
class BackwardUnit {
  static constexpr int PER = Op::PER_ELEMENT;
  typedef typename Op::element element;

 public:
  BackwardUnit(const AttentionBackward& problem, const BackwardScratch<Op>& scratch, const Turns& turns, int64_t unit,
               int64_t before, int64_t b, int64_t g, int64_t first, int64_t count)
      : full(problem), p(problem.forward), s(scratch), turns(turns), unit(unit), before(before), b(b), g(g), first(first),
        count(count), depth(p.dim / PER), value_depth(p.value_dim / PER), key_stride(stride_for(depth)),
        value_stride(stride_for(value_depth)), dkey_stride(stride_for(p.dim)), dvalue_stride(stride_for(p.value_dim)),
        plain(p.softcap == 0 && !p.bias && !p.alibi) {}

  void run() {
    take_keys();
    const int64_t ratio = p.heads / p.kv_heads;
    int64_t step = 0;
    for (int64_t h = g * ratio; h < (g + 1) * ratio; ++h) step = p.indptr ? blocks(h, step) : band(h, step);
    if (before >= 0) turns.wait(turns.state, before, step);
    turns.pass(turns.state, unit, step);
    give_keys();
  }

 private:
  const AttentionBackward& full;
  const Attention& p;
  const BackwardScratch<Op>& s;
  const Turns& turns;
  const int64_t unit, before, b, g, first, count, depth, value_depth, key_stride, value_stride, dkey_stride, dvalue_stride;
  const bool plain;

  void take_keys() {
    for (int64_t j = 0; j < count; ++j) {
      take_row(row_of(p.k, b, g, first + j, p.storage), p.dim, p.storage, s.keys + j * key_stride);
      take_row(row_of(p.v, b, g, first + j, p.storage), p.value_dim, p.storage, s.values + j * value_stride);
    }
    if constexpr (PER == 2) pair(s.keys, key_stride, count, p.dim, s.key_pairs, dkey_stride);
    __builtin_memset(s.dkeys, 0, count * dkey_stride * 4);
    __builtin_memset(s.dvalues, 0, count * dvalue_stride * 4);
  }

  static void pair(const element* rows, int64_t stride, int64_t count, int64_t dim, element* out, int64_t out_stride) {
    if constexpr (PER == 2)
      for (int64_t j = 0; j < count; j += 2) {
        const char* even = reinterpret_cast<const char*>(rows + j * stride);
        pair_rows(even, j + 1 < count ? even + stride * 4 : nullptr, dim, out + j / 2 * out_stride);
      }
  }

  void give_keys() {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t row = (b * p.kv_heads + g) * p.keys + first + j;
      for (int64_t d = 0; d < p.dim; ++d) full.dk[row * p.dim + d] = s.dkeys[j * dkey_stride + d] * p.scale;
      __builtin_memcpy(full.dv + row * p.value_dim, s.dvalues + j * dvalue_stride, p.value_dim * 4);
    }
  }

  // All queries of a head by the band; returns the number of the step after.
  int64_t band(int64_t h, int64_t step) {
    const Scores scores(p, b, h);
    for (int64_t query = 0; query < p.queries; query += STEP, ++step) {
      const int64_t rows = p.queries - query < STEP ? p.queries - query : STEP;
      int64_t low = scores.lowest(query), high = scores.highest(query + rows - 1) + 1;
      if (low < first) low = first;
      if (high > first + count) high = first + count;
      if (low >= high) continue;
      take_queries(h, query, rows);
      low = first + (low - first) / BLOCK * BLOCK;
      high = first + round_up(high - first, BLOCK);
      visit(scores, query, rows, low, high < first + count ? high : first + count, 0, nullptr);
      give_queries(h, query, rows, step);
    }
    return step;
  }

  // The same by the layout: of each of its rows, the entries that lie in the span.
  int64_t blocks(int64_t h, int64_t step) {
    const Scores scores(p, b, h);
    const int64_t query_blocks = (p.queries + p.block_q - 1) / p.block_q, end = (first + count - 1) / p.block_k + 1;
    const int64_t* row = p.indptr + ((p.layout_batch == 1 ? 0 : b) * p.layout_heads + (p.layout_heads == 1 ? 0 : h)) * query_blocks;
    for (int64_t block = 0; block < query_blocks; ++block) {
      const int64_t low = find(row[block], row[block + 1], first / p.block_k), high = find(low, row[block + 1], end);
      for (int64_t cut = 0; cut < p.block_q; cut += STEP, ++step) {
        const int64_t query = block * p.block_q + cut;
        int64_t rows = p.block_q - cut < STEP ? p.block_q - cut : STEP;
        if (rows > p.queries - query) rows = p.queries - query;
        if (low == high || rows <= 0) continue;
        take_queries(h, query, rows);
        for (int64_t entry = low; entry < high; ++entry) {
          const uint8_t* bits = p.kinds[entry] < 0 ? nullptr : p.bits + p.kinds[entry] * ((p.block_q * p.block_k + 7) / 8);
          const int64_t start = p.indices[entry] * p.block_k, stop = start + p.block_k;
          visit(scores, query, rows, start, stop < p.keys ? stop : p.keys, start, bits);
        }
        give_queries(h, query, rows, step);
      }
    }
    return step;
  }

  // First entry from .. to whose key block is not below `block`.
  int64_t find(int64_t from, int64_t to, int64_t block) const {
    while (from < to) {
      const int64_t middle = (from + to) / 2;
      if (p.indices[middle] < block) from = middle + 1; else to = middle;
    }
    return from;
  }

  void take_queries(int64_t h, int64_t query, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      take_row(row_of(p.q, b, h, query + i, p.storage), p.dim, p.storage, s.queries + i * key_stride);
      take_row(row_of(full.grad_out, b, h, query + i, full.grad_storage), p.value_dim, full.grad_storage, s.grads + i * value_stride);
    }
    const int64_t height = round_up(rows, PANEL), places = (b * p.heads + h) * p.queries + query;
    __builtin_memset(s.queries + rows * key_stride, 0, (height - rows) * key_stride * 4);
    __builtin_memset(s.grads + rows * value_stride, 0, (height - rows) * value_stride * 4);
    __builtin_memset(s.dqueries, 0, height * dkey_stride * 4);
    for (int64_t i = 0; i < height; ++i) {  // lanes without a query, and queries that see nothing, get weights of 0
      const float lse = i < rows ? p.lse[places + i] : -INF;
      s.lse[i] = lse == -INF ? INF : lse * LOG2E;
      s.delta[i] = i < rows ? full.delta[places + i] : 0.0f;
    }
    const int64_t deep = round_up(depth, LANES), value_deep = round_up(value_depth, LANES);
    for (int64_t i = 0; i < height; i += PANEL) {
      transpose(s.queries + i * key_stride, key_stride, deep, s.query_panels + i * deep);
      transpose(s.grads + i * value_stride, value_stride, value_deep, s.grad_panels + i * value_deep);
    }
    pair(s.queries, key_stride, height, p.dim, s.query_pairs, dkey_stride);
    pair(s.grads, value_stride, height, p.value_dim, s.grad_pairs, dvalue_stride);
  }

  void give_queries(int64_t h, int64_t query, int64_t rows, int64_t step) {
    if (before >= 0) turns.wait(turns.state, before, step + 1);
    for (int64_t i = 0; i < rows; ++i) {
      float* dq = full.dq + ((b * p.heads + h) * p.queries + query + i) * p.dim;
      for (int64_t d = 0; d < p.dim; ++d) dq[d] += s.dqueries[i * dkey_stride + d] * p.scale;
    }
    turns.pass(turns.state, unit, step + 1);
  }

  // Keys start .. end - 1 for the queries that were taken.
  void visit(const Scores& scores, int64_t query, int64_t rows, int64_t start, int64_t end, int64_t origin, const uint8_t* bits) {
    for (int64_t key = start; key < end; key += TILE)
      tile(scores, query, rows, key, int(end - key < TILE ? end - key : TILE), origin, bits);
  }

  void tile(const Scores& scores, int64_t query, int64_t rows, int64_t start, int keys, int64_t origin, const uint8_t* bits) {
    const int64_t row = start - first;
    for (int i = 0; i < rows; i += PANEL) {
      const int64_t height = rows - i < PANEL ? rows - i : PANEL;
      const bool whole = plain && scores.sees_all(query + i, height, start, keys, bits);
      for (int j = 0; j < keys; j += BLOCK) {
        const int live = keys - j < BLOCK ? keys - j : BLOCK;
        if (whole && live == BLOCK)
          pairs_of<true>(scores, query, i, height, start, j, live, origin, bits);
        else
          pairs_of<false>(scores, query, i, height, start, j, live, origin, bits);
      }
    }
    const int across = int(round_up(rows, 2)) / PER;
    const element *query_rows = PER == 2 ? s.query_pairs : s.queries, *grad_rows = PER == 2 ? s.grad_pairs : s.grads;
    add_product<Op, STEP / PER, 1>(s.weights, keys, grad_rows, dvalue_stride, across, p.value_dim, s.dvalues + row * dvalue_stride, dvalue_stride);
    add_product<Op, STEP / PER, 1>(s.dscores, keys, query_rows, dkey_stride, across, p.dim, s.dkeys + row * dkey_stride, dkey_stride);
    add_product<Op, 1, STEP>(PER == 2 ? s.dscore_pairs : s.dscores, int(round_up(rows, BLOCK)),
                             PER == 2 ? s.key_pairs + row / 2 * dkey_stride : s.keys + row * key_stride, dkey_stride,
                             (keys + PER - 1) / PER, p.dim, s.dqueries, dkey_stride);
  }

  // Weights and gradients of scores of BLOCK keys, `live` of them real, for the panel of queries that starts at `i`.
  // WHOLE: all see all, and scores are nothing but scale * q.k.
  template <bool WHOLE>
  __attribute__((always_inline)) void pairs_of(const Scores& scores, int64_t query, int i, int64_t height, int64_t start, int j, int live,
                              int64_t origin, const uint8_t* bits) {
    alignas(64) float score[BLOCK * PANEL], dweight[BLOCK * PANEL], slope[WHOLE ? 1 : BLOCK * PANEL];
    const bool hidden = !WHOLE && scores.sees_nothing(query + i, height, start + j, live);
    float factor = LOG2E;
    if (!hidden) {
      const element *key[BLOCK], *value[BLOCK];
      const int64_t row = start - first + j;
      for (int r = 0; r < BLOCK; ++r) {
        key[r] = s.keys + (row + (r < live ? r : 0)) * key_stride;
        value[r] = s.values + (row + (r < live ? r : 0)) * value_stride;
      }
      product_rows<Op, BLOCK>(key, s.query_panels + i * round_up(depth, LANES), int(depth), score);
      product_rows<Op, BLOCK>(value, s.grad_panels + i * round_up(value_depth, LANES), int(value_depth), dweight);
      if (plain) factor *= p.scale;
      if (!WHOLE && !plain) scores.transform(query + i, height, start + j, live, score, slope);
      if (!WHOLE && !scores.sees_all(query + i, height, start + j, live, bits)) scores.mask(query + i, start + j, live, origin, bits, score);
    }
#pragma GCC unroll 2
    for (int half = 0; half < PANEL; half += LANES) {
      const vf lse = load(s.lse + i + half), delta = load(s.delta + i + half);
      vf last = {};
#pragma GCC unroll 8
      for (int r = 0; r < BLOCK; ++r) {
        vf weight = {}, dscore = {};
        if (WHOLE || (!hidden && r < live)) {
          const vf x = load(score + r * PANEL + half);
          weight = exp2v(x * factor - lse);
          if (!WHOLE) weight = x == -INF ? vf{} : weight;
          dscore = weight * (load(dweight + r * PANEL + half) - delta);
          if (!WHOLE) dscore = weight == 0.0f ? vf{} : dscore;
          if (!WHOLE && p.softcap > 0) dscore *= load(slope + r * PANEL + half);
        }
        const int place = ((j + r) * STEP + i + half) / PER;
        keep(s.weights + place, weight);
        keep(s.dscores + place, dscore);
        if constexpr (PER == 2) {
          if (r % 2) *reinterpret_cast<vu_any*>(s.dscore_pairs + (j + r) / 2 * STEP + i + half) = pair_bf16(last, dscore);
          last = dscore;
        }
      }
    }
  }

  static void keep(float* place, vf x) { store(place, x); }
  static void keep(uint32_t* place, vf x) { *reinterpret_cast<vh_any*>(place) = narrow_bf16(x); }
};

// Whether bf16 is multiplied in pairs: then rows must be whole pairs, and tiles begin at even keys.
INLINE bool backward_paired(const Attention& p) {
  return HAS_BF16_DOT && p.storage == BF16 && p.dim % 2 == 0 && p.value_dim % 2 == 0 && (!p.indptr || p.block_k % 2 == 0);
}

template <class Op>
static void backward_unit(const AttentionBackward& p, char* memory, const Turns& turns, int64_t unit, int64_t before,
                          int64_t b, int64_t g, int64_t first, int64_t count, int64_t span) {
  BackwardScratch<Op> scratch;
  scratch.lay_out(p.forward, span, memory);
  BackwardUnit<Op>(p, scratch, turns, unit, before, b, g, first, count).run();
}

}  // namespace saccade::SACCADE_ISA
