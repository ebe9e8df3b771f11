// Softmax attention of one block of queries of one head: the tiles of keys that it sees, in order.
#pragma once
#include "rows.hpp"
#include "scores.hpp"

namespace saccade::SACCADE_ISA {

constexpr int UNIT = 64;                       // queries of a unit of work, at most
constexpr int PANELS = UNIT / PANEL;           // its panels

// Where a unit keeps what it works on; one per thread, sized by the problem.
struct Scratch {
  float* queries;    // [PANELS][dim][PANEL], or pairs of bf16 [PANELS][dim / 2][PANEL]
  float* outputs;    // [PANELS][value_dim][PANEL]
  float* scores;     // [TILE][PANEL]
  uint32_t* weights; // [TILE / 2][PANEL], pairs of bf16
  float* keys;       // [TILE][dim], converted
  float* values;     // [TILE][value_dim], converted or paired
  float* zeros;      // [value_dim]
  float* seen;       // [TILE][PANEL], -inf where a pair is hidden; only where values are poisoned
};

// Bytes of a thread's scratch; with `memory` also lays it out there (64-byte aligned).
static int64_t lay_out(const Attention& p, Scratch* scratch, char* memory) {
  int64_t used = 0;
  auto take = [&](int64_t floats) {
    char* place = memory + used;
    used += (floats * 4 + 63) / 64 * 64;
    return reinterpret_cast<float*>(place);
  };
  Scratch s;
  s.queries = take(int64_t(UNIT) * p.dim);
  s.outputs = take(int64_t(UNIT) * p.value_dim);
  s.scores = take(int64_t(TILE) * PANEL);
  s.weights = reinterpret_cast<uint32_t*>(take(int64_t(TILE) / 2 * PANEL));
  s.keys = take(int64_t(TILE) * p.dim);
  s.values = take(int64_t(TILE) * p.value_dim);
  s.zeros = take(p.value_dim + LANES);
  s.seen = take(int64_t(TILE) * PANEL);
  if (scratch) {
    *scratch = s;
    for (int64_t e = 0; e < p.value_dim + LANES; ++e) s.zeros[e] = 0;
  }
  return used;
}

// One unit of work and what it has accumulated.
class Unit {
 public:
  Unit(const Attention& problem, const Scratch& scratch, int64_t b, int64_t h, int64_t first, int64_t count)
      : p(problem), s(scratch), b(b), h(h), g(h / (problem.heads / problem.kv_heads)), first(first), count(count),
        paired(HAS_BF16_DOT && problem.storage == BF16 && problem.dim % 2 == 0),
        plain(problem.scale > 0 && problem.softcap == 0 && !problem.bias && !problem.alibi), scores(problem, b, h) {}

  void run() {
    pack_queries();
    if (p.indptr) {
      int64_t row = ((p.layout_batch == 1 ? 0 : b) * p.layout_heads + (p.layout_heads == 1 ? 0 : h));
      row = row * ((p.queries + p.block_q - 1) / p.block_q) + first / p.block_q;
      for (int64_t entry = p.indptr[row]; entry < p.indptr[row + 1]; ++entry) {
        const uint8_t* bits = p.kinds[entry] < 0 ? nullptr : p.bits + p.kinds[entry] * ((p.block_q * p.block_k + 7) / 8);
        int64_t start = p.indices[entry] * p.block_k, end = start + p.block_k < p.keys ? start + p.block_k : p.keys;
        visit(start, end, start, bits);
      }
    } else {
      visit(scores.lowest(first), scores.highest(first + count - 1) + 1, 0, nullptr);
    }
    finish();
  }

 private:
  const Attention& p;
  const Scratch& s;
  const int64_t b, h, g, first, count;
  const bool paired, plain;
  const Scores scores;
  vf top[2 * PANELS], sum[2 * PANELS];

  int64_t rows_in(int panel) const {
    int64_t left = count - panel * PANEL;
    return left < 0 ? 0 : left > PANEL ? PANEL : left;
  }

  // Queries across the lanes; lanes without a query hold zeros, whose results nobody reads.
  void pack_queries() {
    for (int n = 0; n < PANELS; ++n) {
      top[2 * n] = top[2 * n + 1] = splat(-INF);
      sum[2 * n] = sum[2 * n + 1] = vf{};
      int64_t rows = rows_in(n);
      if (!rows) continue;
      float* out = s.queries + n * p.dim * PANEL;
      for (int64_t d = 0; d < p.dim * PANEL / (paired ? 2 : 1); ++d) out[d] = 0;
      for (int64_t e = 0; e < p.value_dim * PANEL; ++e) s.outputs[n * p.value_dim * PANEL + e] = 0;
      for (int64_t i = 0; i < rows; ++i) {
        const char* row = row_of(p.q, b, h, first + n * PANEL + i, p.storage);
        if (paired) {
          const uint16_t* half = reinterpret_cast<const uint16_t*>(row);
          uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
          for (int64_t d = 0; d < p.dim / 2; ++d) pairs[d * PANEL + i] = half[2 * d] | uint32_t(half[2 * d + 1]) << 16;
        } else {
          for (int64_t d = 0; d < p.dim; ++d) out[d * PANEL + i] = read(row, d, p.storage);
        }
      }
    }
  }

  // All keys start .. end - 1; `bits` masks them, its block beginning at key `origin`.
  void visit(int64_t start, int64_t end, int64_t origin, const uint8_t* bits) {
    for (int64_t key = start; key < end; key += TILE) tile(key, int(end - key < TILE ? end - key : TILE), origin, bits);
  }

  void tile(int64_t start, int keys, int64_t origin, const uint8_t* bits) {
    const float *key[TILE], *value[TILE];
    for (int j = 0; j < keys; ++j) {
      const char *k = row_of(p.k, b, g, start + j, p.storage), *v = row_of(p.v, b, g, start + j, p.storage);
      if (p.storage != FP32 && !paired) {
        widen_row(k, p.dim, p.storage, s.keys + j * p.dim);
        widen_row(v, p.value_dim, p.storage, s.values + j * p.value_dim);
        k = reinterpret_cast<const char*>(s.keys + j * p.dim);
        v = reinterpret_cast<const char*>(s.values + j * p.value_dim);
      }
      key[j] = reinterpret_cast<const float*>(k);
      value[j] = reinterpret_cast<const float*>(v);
    }
    // Values that some queries must not see may be poisoned: 0 * NaN would reach these. Poisoned rows are set apart.
    bool masked[PANELS], any_masked = false;
    for (int n = 0; n < PANELS; ++n) any_masked |= masked[n] = rows_in(n) && !scores.sees_all(first + n * PANEL, rows_in(n), start, keys, bits);
    int poisoned[TILE], poisons = 0;
    if (any_masked)
      for (int j = 0; j < keys; ++j)
        if (is_poisoned(value[j])) poisoned[poisons++] = j;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(s.values);
    if (paired) pair_values(value, keys, poisoned, poisons);
    for (int n = 0; n < PANELS; ++n) {
      int64_t from = first + n * PANEL, height = rows_in(n);
      if (!height || (masked[n] && scores.sees_nothing(from, height, start, keys))) continue;
      const float* queries = s.queries + n * p.dim * PANEL;
      float* out = s.outputs + n * p.value_dim * PANEL;
      if (paired)
        product<Pairs>(reinterpret_cast<const uint32_t* const*>(key), keys, reinterpret_cast<const uint32_t*>(queries), int(p.dim / 2), s.scores);
      else
        product<Single>(key, keys, queries, int(p.dim), s.scores);
      if (!plain) scores.transform(from, height, start, keys, s.scores, nullptr);
      if (masked[n]) scores.mask(from, start, keys, origin, bits, s.scores);
      vf factor[2];
      float scale = (plain ? p.scale : 1.0f) * LOG2E;
      for (int half = 0; half < 2; ++half)
        factor[half] = soften(s.scores + half * LANES, keys, scale, &top[2 * n + half], &sum[2 * n + half]);
      if (paired) {
        pair_weights(keys);
        const uint32_t* rows[TILE / 2];
        for (int j = 0; 2 * j < keys; ++j) rows[j] = pairs + j * p.value_dim;
        accumulate<Pairs>(rows, (keys + 1) / 2, int(p.value_dim), s.weights, factor, out);
      } else {
        const float* rows[TILE];
        for (int j = 0; j < keys; ++j) rows[j] = value[j];
        for (int j = 0; j < poisons; ++j) rows[poisoned[j]] = s.zeros;
        accumulate<Single>(rows, keys, int(p.value_dim), s.scores, factor, out);
      }
      if (poisons && masked[n]) find_seen(from, height, start, keys, origin, bits);
      for (int j = 0; j < poisons; ++j) {
        const int64_t row = int64_t(poisoned[j]) * PANEL;
        add_poison(value[poisoned[j]], s.scores + row, masked[n] ? s.seen + row : nullptr, out);
      }
    }
  }

  bool is_poisoned(const float* value) const {
    if (!paired) return has_poison(value, p.value_dim);
    const char* row = reinterpret_cast<const char*>(value);
    for (int64_t e = 0; e < p.value_dim; ++e)
      if (read(row, e, BF16) * 0.0f != 0) return true;
    return false;
  }

  // What is hidden, as the scores are where q.k = 0: a visible score may be -inf too.
  void find_seen(int64_t from, int64_t height, int64_t start, int keys, int64_t origin, const uint8_t* bits) {
    for (int64_t i = 0; i < int64_t(keys) * PANEL; i += LANES) store(s.seen + i, vf{});
    if (p.bias) scores.transform(from, height, start, keys, s.seen, nullptr);
    scores.mask(from, start, keys, origin, bits, s.seen);
  }

  // Adds the weighted values of one row where it is seen (null: everywhere), also where the weight is 0.
  void add_poison(const float* value, const float* weights, const float* seen, float* out) {
    const char* row = reinterpret_cast<const char*>(value);
    for (int64_t e = 0; e < p.value_dim; ++e)
      for (int half = 0; half < 2; ++half) {
        float* place = out + e * PANEL + half * LANES;
        vf weight = load(weights + half * LANES), old = load(place);
        float x = paired ? read(row, e, BF16) : value[e];
        const vi visible = seen ? load(seen + half * LANES) != -INF : ~vi{};
        store(place, visible ? old + weight * x : old);
      }
  }

  void pair_values(const float* const* value, int keys, const int* poisoned, int poisons) {
    const char* rows[TILE + 1];
    for (int j = 0; j < keys; ++j) rows[j] = reinterpret_cast<const char*>(value[j]);
    for (int j = 0; j < poisons; ++j) rows[poisoned[j]] = reinterpret_cast<const char*>(s.zeros);
    rows[keys] = nullptr;
    for (int j = 0; j < keys; j += 2)
      pair_rows(rows[j], rows[j + 1], p.value_dim, reinterpret_cast<uint32_t*>(s.values) + j / 2 * p.value_dim);
  }

  void pair_weights(int keys) {
    for (int j = 0; j < keys; j += 2)
      for (int i = 0; i < PANEL; i += LANES) {
        vf odd = j + 1 < keys ? load(s.scores + (j + 1) * PANEL + i) : vf{};
        *reinterpret_cast<vu_any*>(s.weights + j / 2 * PANEL + i) = pair_bf16(load(s.scores + j * PANEL + i), odd);
      }
  }

  void finish() {
    for (int n = 0; n < PANELS; ++n) {
      int64_t rows = rows_in(n);
      for (int64_t i = 0; i < rows; ++i) {
        float total = sum[2 * n + i / LANES][i % LANES], high = top[2 * n + i / LANES][i % LANES];
        int64_t row = (b * p.heads + h) * p.queries + first + n * PANEL + i;
        float share = total == 0 ? 0.0f : 1.0f / total;
        const float* column = s.outputs + n * p.value_dim * PANEL + i;
        for (int64_t e = 0; e < p.value_dim; ++e) p.out[row * p.value_dim + e] = column[e * PANEL] * share;
        p.lse[row] = total == 0 ? -INF : high * (plain ? p.scale : 1.0f) + __builtin_logf(total);
      }
    }
  }
};

}  // namespace saccade::SACCADE_ISA
