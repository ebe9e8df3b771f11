// Softmax attention of one block of queries of one head: the tiles of keys that it sees, in order.
#pragma once
#include "problem.hpp"
#include "tile.hpp"

namespace saccade::SACCADE_ISA {

constexpr int UNIT = 64;                       // queries of a unit of work, at most
constexpr int PANELS = UNIT / PANEL;           // its panels
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

// Where a unit keeps what it works on; one per thread, sized by the problem.
struct Scratch {
  float* queries;    // [PANELS][dim][PANEL], or pairs of bf16 [PANELS][dim / 2][PANEL]
  float* outputs;    // [PANELS][value_dim][PANEL]
  float* scores;     // [TILE][PANEL]
  uint32_t* weights; // [TILE / 2][PANEL], pairs of bf16
  float* keys;       // [TILE][dim], converted
  float* values;     // [TILE][value_dim], converted or paired
  float* zeros;      // [value_dim]
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
  if (scratch) *scratch = s;
  return used;
}

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
    vu low = __builtin_convertvector(*reinterpret_cast<const vh_any*>(e + d), vu), high = {};
    if (o) high = __builtin_convertvector(*reinterpret_cast<const vh_any*>(o + d), vu);
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

// One unit of work and what it has accumulated.
class Unit {
 public:
  Unit(const Attention& problem, const Scratch& scratch, int64_t b, int64_t h, int64_t first, int64_t count)
      : p(problem), s(scratch), b(b), h(h), g(h / (problem.heads / problem.kv_heads)), first(first), count(count),
        paired(HAS_BF16_DOT && problem.storage == BF16 && problem.dim % 2 == 0),
        plain(problem.scale > 0 && problem.softcap == 0 && !problem.bias) {}

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
      visit(lowest(first), highest(first + count - 1) + 1, 0, nullptr);
    }
    finish();
  }

 private:
  const Attention& p;
  const Scratch& s;
  const int64_t b, h, g, first, count;
  const bool paired, plain;
  vf top[2 * PANELS], sum[2 * PANELS];

  // Keys that a query sees by the band.
  int64_t lowest(int64_t i) const { return p.left < 0 ? 0 : clamp(i + p.keys - p.queries - p.left); }
  int64_t highest(int64_t i) const { return p.right < 0 ? p.keys - 1 : clamp(i + p.keys - p.queries + p.right + 1) - 1; }
  int64_t clamp(int64_t key) const { return key < 0 ? 0 : key > p.keys ? p.keys : key; }

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
    for (int n = 0; n < PANELS; ++n) any_masked |= masked[n] = rows_in(n) && !sees_all(n, start, keys, bits);
    int poisoned[TILE], poisons = 0;
    if (any_masked)
      for (int j = 0; j < keys; ++j)
        if (is_poisoned(value[j])) poisoned[poisons++] = j;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(s.values);
    if (paired) pair_values(value, keys, poisoned, poisons);
    for (int n = 0; n < PANELS; ++n) {
      if (!rows_in(n) || (masked[n] && sees_nothing(n, start, keys))) continue;
      const float* queries = s.queries + n * p.dim * PANEL;
      float* out = s.outputs + n * p.value_dim * PANEL;
      if (paired)
        product<Pairs>(reinterpret_cast<const uint32_t* const*>(key), keys, reinterpret_cast<const uint32_t*>(queries), int(p.dim / 2), s.scores);
      else
        product<Single>(key, keys, queries, int(p.dim), s.scores);
      if (!plain) transform(n, start, keys);
      if (masked[n]) mask(n, start, keys, origin, bits);
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
      for (int j = 0; j < poisons; ++j) add_poison(value[poisoned[j]], s.scores + poisoned[j] * PANEL, out);
    }
  }

  bool is_poisoned(const float* value) const {
    if (!paired) return has_poison(value, p.value_dim);
    const char* row = reinterpret_cast<const char*>(value);
    for (int64_t e = 0; e < p.value_dim; ++e)
      if (read(row, e, BF16) * 0.0f != 0) return true;
    return false;
  }

  // Adds the weighted values of one row where the weight is not zero.
  void add_poison(const float* value, const float* weights, float* out) {
    const char* row = reinterpret_cast<const char*>(value);
    for (int64_t e = 0; e < p.value_dim; ++e)
      for (int half = 0; half < 2; ++half) {
        float* place = out + e * PANEL + half * LANES;
        vf weight = load(weights + half * LANES), old = load(place);
        float x = paired ? read(row, e, BF16) : value[e];
        store(place, weight != 0.0f ? old + weight * x : old);
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

  bool sees_all(int n, int64_t start, int keys, const uint8_t* bits) const {
    if (bits || p.q_segments) return false;
    int64_t from = first + n * PANEL, to = from + rows_in(n) - 1;
    return start >= lowest(to) && start + keys - 1 <= highest(from);
  }

  bool sees_nothing(int n, int64_t start, int keys) const {
    int64_t from = first + n * PANEL, to = from + rows_in(n) - 1;
    return start > highest(to) || start + keys - 1 < lowest(from);
  }

  // Scores as softmax wants them: scaled, capped, biased.
  void transform(int n, int64_t start, int keys) {
    const float* bias = p.bias;
    if (bias) bias += b * p.bias_stride[0] + h * p.bias_stride[1];
    int64_t rows = rows_in(n);
    for (int j = 0; j < keys; ++j)
      for (int half = 0; half < 2; ++half) {
        float* place = s.scores + j * PANEL + half * LANES;
        vf x = load(place) * p.scale;
        if (p.softcap > 0) {  // tanh(y) = 1 - 2 / (exp(2y) + 1), which is right at both ends
          vf e = exp2v(x * (2 * LOG2E / p.softcap) > 120.0f ? splat(120.0f) : x * (2 * LOG2E / p.softcap));
          vf small = x / p.softcap;
          vf odd = small - small * small * small / 3.0f;
          vf magnitude = small < 0.0f ? -small : small;
          x = p.softcap * (magnitude < 0.01f ? odd : 1.0f - 2.0f / (e + 1.0f));
        }
        if (bias)
          for (int i = 0; i < LANES; ++i)
            if (half * LANES + i < rows)
              x[i] += bias[(first + n * PANEL + half * LANES + i) * p.bias_stride[2] + (start + j) * p.bias_stride[3]];
        store(place, x);
      }
  }

  // Hides what the band, the layout's bits and the segments hide.
  void mask(int n, int64_t start, int keys, int64_t origin, const uint8_t* bits) {
    int64_t from = first + n * PANEL;
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    for (int half = 0; half < 2; ++half) {
      int64_t query = from + half * LANES, offset = p.keys - p.queries;
      vi segment = {};
      if (p.q_segments)
        for (int i = 0; i < LANES; ++i)
          segment[i] = query + i < p.queries ? p.q_segments[b * p.q_segment_stride + query + i] : -1;
      for (int j = 0; j < keys; ++j) {
        float* place = s.scores + j * PANEL + half * LANES;
        vf x = load(place);
        // j visible if key - offset - right <= query <= key - offset + left; bounds relative to the first lane
        if (p.right >= 0) x = lane >= near(start + j - offset - p.right - query) ? x : splat(-INF);
        if (p.left >= 0) x = lane <= near(start + j - offset + p.left - query) ? x : splat(-INF);
        if (bits) x = row_bits(bits, query % p.block_q, start + j - origin) != 0 ? x : splat(-INF);
        if (p.q_segments) {
          vi other = splat(p.kv_segments[b * p.kv_segment_stride + start + j]);
          x = ((segment == other) & (segment >= 0)) != 0 ? x : splat(-INF);
        }
        store(place, x);
      }
    }
  }

  static int32_t near(int64_t x) { return int32_t(x < -1 ? -1 : x > LANES ? LANES : x); }

  // Bits of one key for the queries of a vector, whose first is `query` of the block.
  vi row_bits(const uint8_t* bits, int64_t query, int64_t key) const {
    vi found = {};
    for (int i = 0; i < LANES && query + i < p.block_q; ++i) {
      int64_t bit = (query + i) * p.block_k + key;
      found[i] = bits[bit >> 3] >> (bit & 7) & 1;
    }
    return found;
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
