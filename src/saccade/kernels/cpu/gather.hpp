// Attention of few queries over lists of keys, bound by the walk from row to row: rows lie far apart, so that each costs a
// translation of its address besides its lines. The list says early which rows come; none is copied, and each is read once
// for all the queries that share it.
//
// Many rows are asked for at a time: addresses of several are then translated at once, where the products between two requests
// would be more than the machine looks ahead. Tokens that came together also take their weights together. Vectors lie along
// the head dim. Softmax is kept for four queries by four tokens, all in one vector where it has 16 lanes.
#pragma once
#include "decode.hpp"
#include "problem_gather.hpp"
#include "scan_rows.hpp"

namespace saccade::SACCADE_ISA {

constexpr int FEW = 4;               // tokens, and queries, whose products are taken together
constexpr int PAIRS = FEW * FEW;     // their scores
constexpr int TOGETHER = 64;         // tokens that are weighed together, while those after them come to the second cache

template <int32_t STORAGE>
INLINE vf take_row(const char* row, int64_t d) {
  if constexpr (STORAGE == FP32) return load(reinterpret_cast<const float*>(row) + d);
  const vh half = *reinterpret_cast<const vh_any*>(row + 2 * d);
  return STORAGE == BF16 ? widen_bf16(half) : widen_fp16(half);
}

// Whether keys and queries meet as pairs of bf16: their products are exact in fp32.
template <int32_t STORAGE>
INLINE bool in_pairs(int64_t dim) { return STORAGE == BF16 && HAS_BF16_DOT && dim % (2 * LANES) == 0; }

// scores[r][j] = queries[r] . keys[j] for R <= FEW queries; other rows of `scores` become 0.
template <int32_t STORAGE, int R, bool PAIRED>
INLINE void few_dots(const char* const* keys, const float* queries, int64_t dim, float* scores) {
  constexpr int T = LANES / FEW;  // tokens whose sums fill one vector
  for (int first = 0; first < FEW; first += T) {
    vf acc[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) acc[i] = vf{};
    for (int64_t d = 0; d < (PAIRED ? dim / 2 : dim); d += LANES) {  // a word is a channel, or a pair of them
      vf key[T];
#pragma GCC unroll 4
      for (int j = 0; j < T; ++j) key[j] = take_row<PAIRED ? FP32 : STORAGE>(keys[first + j], d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vf query = load(queries + r * dim + d);
#pragma GCC unroll 4
        for (int j = 0; j < T; ++j) {
          if constexpr (PAIRED)
            acc[r * T + j] = dot_bf16(acc[r * T + j], (vu)key[j], (vu)query);
          else
            acc[r * T + j] += key[j] * query;
        }
      }
    }
    float sums[LANES];
    store(sums, sums_of(acc));
#pragma GCC unroll 4
    for (int r = 0; r < FEW; ++r) __builtin_memcpy(scores + r * FEW + first, sums + r * T, T * sizeof(float));
  }
}

// out[r] += sum over j < count, a multiple of FEW, of weights[j / FEW][r][j % FEW] * values[j], in V vectors from e on.
template <int32_t STORAGE, int R, int V>
INLINE void few_channels(const char* const* values, int64_t count, const float* weights, int64_t dim, int64_t e, float* out) {
  vf acc[V][R];
#pragma GCC unroll 8
  for (int i = 0; i < V * R; ++i) acc[i / R][i % R] = load(out + i % R * dim + e + i / R * LANES);
  for (int64_t first = 0; first < count; first += FEW)
#pragma GCC unroll 4
    for (int j = 0; j < FEW; ++j)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) {
        const vf value = take_row<STORAGE>(values[first + j], e + i * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[i][r] += splat(weights[first * FEW + r * FEW + j]) * value;
      }
#pragma GCC unroll 8
  for (int i = 0; i < V * R; ++i) store(out + i % R * dim + e + i / R * LANES, acc[i / R][i % R]);
}

template <int32_t STORAGE, int R>
INLINE void few_values(const char* const* values, int64_t count, const float* weights, int64_t dim, float* out) {
  int64_t e = 0;
  for (; e + 2 * LANES <= dim; e += 2 * LANES) few_channels<STORAGE, R, 2>(values, count, weights, dim, e, out);
  if (e < dim) few_channels<STORAGE, R, 1>(values, count, weights, dim, e, out);
}

// One list's stretch for all the queries that share it.
template <int32_t STORAGE>
class Picker {
 public:
  static int64_t rows_of(const Gather& p) { return round_up(p.heads / p.list_heads * p.list_group, FEW); }
  static int64_t partial(const Gather& p) { return round_up(rows_of(p) * (p.value_dim + 2), 16); }
  static int64_t scratch(const Gather& p) {
    return MOST_SLOTS * 16 + (round_up(rows_of(p) * p.dim, 16) + rows_of(p) / FEW * 2 * PAIRS) * 4;
  }

  Picker(const Gather& problem, const Stretch& unit, char* memory, float* result)
      : p(problem), u(unit), share(p.heads / p.list_heads), all(rows_of(p)), paired(in_pairs<STORAGE>(p.dim)) {
    members = p.queries - u.n * p.list_group;
    if (members > p.list_group) members = p.list_group;
    rows = share * members;
    key_place = reinterpret_cast<int64_t*>(memory);
    value_place = key_place + MOST_SLOTS;
    queries = reinterpret_cast<float*>(memory + MOST_SLOTS * 16);
    top = queries + round_up(all * p.dim, 16);
    sum = top + all / FEW * PAIRS;
    out = result;
  }

  bool run() {
    if (!read_list()) return false;
    for (int64_t i = 0; i < rows; ++i) {
      const char* row = row_of(p.q, u.b, u.t * share + i / members, u.n * p.list_group + i % members, STORAGE);
      if (paired)
        __builtin_memcpy(queries + i * p.dim, row, size_t(p.dim) * 2);
      else
        for (int64_t d = 0; d < p.dim; d += LANES) store(queries + i * p.dim + d, take_row<STORAGE>(row, d));
    }
    for (int64_t i = 0; i < rows * p.value_dim; ++i) out[i] = 0;
    for (int64_t i = 0; i < all / FEW * PAIRS; ++i) top[i] = -INF, sum[i] = 0;
    ask(0);
    for (int64_t j = 0; j < count; j += TOGETHER) {
      ask(j + TOGETHER);
      paired ? tokens<STORAGE == BF16>(j) : tokens<false>(j);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = sum + r * FEW;
      out[all * p.value_dim + r] = top[r * FEW];
      out[all * (p.value_dim + 1) + r] = (from[0] + from[1]) + (from[2] + from[3]);
    }
    return true;
  }

 private:
  const Gather& p;
  const Stretch& u;
  const int64_t share, all;
  const bool paired;
  static constexpr int64_t BYTES = STORAGE == FP32 ? 4 : 2;
  int64_t members, rows, count = 0;
  int64_t *key_place, *value_place;  // of the keys that are seen and their values, in bytes
  float *queries, *top, *sum;  // [all][dim], in pairs half of each; [all / FEW][PAIRS]: of rows, in base 2, and tokens of four
  float* out;                  // [all][value_dim], then [all] tops and [all] sums

  bool read_list() {
    const int64_t* list = p.lists + u.b * p.list_stride[0] + u.t * p.list_stride[1] + u.n * p.list_stride[2];
    const int64_t g = u.t * share / (p.heads / p.kv_heads);
    const int64_t* table = p.table ? p.table + u.b * p.table_stride[0] + g * p.table_stride[1] : nullptr;
    const int64_t* keys = table ? p.key_table + u.b * p.key_table_stride[0] + g * p.key_table_stride[1] : nullptr;
    const int64_t end = table ? p.lengths[u.b * p.kv_heads + g] : p.causal ? u.n + p.keys - p.queries + 1 : p.keys;
    bool inside = true;
    for (int64_t slot = u.start; slot < u.end; ++slot) {
      const int64_t at = list[slot];
      inside &= table || (at >= -1 && at < p.keys);
      if (at < 0 || at >= end) continue;
      key_place[count] = place_of(p.k, g, keys, at);
      value_place[count++] = place_of(p.v, g, table, at);
    }
    return inside;
  }

  int64_t place_of(const Rows& x, int64_t g, const int64_t* table, int64_t at) const {
    if (table) return (table[at / p.page_size] * x.batch_stride + at % p.page_size * x.row_stride) * BYTES;
    return (u.b * x.batch_stride + g * x.head_stride + at * x.row_stride) * BYTES;
  }

  // Asks for the rows of tokens j .. j + TOGETHER - 1, as far as there are any.
  __attribute__((always_inline)) void ask(int64_t j) const {
    for (int64_t i = j; i < j + TOGETHER && i < count; ++i) {
      ask_for(key_of(i), p.dim * BYTES);
      ask_for(value_of(i), p.value_dim * BYTES);
    }
  }

  const char* key_of(int64_t i) const { return static_cast<const char*>(p.k.data) + key_place[i]; }
  const char* value_of(int64_t i) const { return static_cast<const char*>(p.v.data) + value_place[i]; }

  __attribute__((always_inline)) static void ask_for(const char* row, int64_t bytes) {
    const char* at = row - (reinterpret_cast<uintptr_t>(row) & 63);
    for (; at < row + bytes; at += 64) __builtin_prefetch(at, 0, 2);
  }

  // Tokens from j on, TOGETHER or what is left. Fours are filled up with the last one again, with no weight.
  template <bool PAIRED>
  void tokens(int64_t j) {
    const int64_t here = count - j < TOGETHER ? count - j : TOGETHER, whole = round_up(here, FEW);
    const char *keys[TOGETHER], *values[TOGETHER];
    for (int64_t i = 0; i < whole; ++i) {
      const int64_t token = j + (i < here ? i : here - 1);
      keys[i] = key_of(token);
      values[i] = value_of(token);
    }
    int64_t r = 0;
    for (; r + FEW <= rows; r += FEW) block<FEW, PAIRED>(keys, values, r, here, whole);
    switch (rows - r) {
      case 3: block<3, PAIRED>(keys, values, r, here, whole); break;
      case 2: block<2, PAIRED>(keys, values, r, here, whole); break;
      case 1: block<1, PAIRED>(keys, values, r, here, whole); break;
    }
  }

  template <int R, bool PAIRED>
  inline __attribute__((always_inline)) void block(const char* const* keys, const char* const* values, int64_t r, int64_t here,
                                                   int64_t whole) {
    float x[TOGETHER * FEW];  // of four tokens after four tokens: [FEW rows][FEW tokens]
    for (int64_t i = 0; i < whole; i += FEW) few_dots<STORAGE, R, PAIRED>(keys + i, queries + r * p.dim, p.dim, x + i * FEW);
    soften<R>(x, r, here);
    few_values<STORAGE, R>(values, whole, x, p.value_dim, out + r * p.value_dim);
  }

  // Scores become weights relative to the greatest score so far; where that rises, what was summed shrinks.
  template <int R>
  inline __attribute__((always_inline)) void soften(float* x, int64_t r, int64_t here) {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    const vf factor = splat(p.softcap > 0 ? p.scale : p.scale * LOG2E);
    for (int i = 0; i < R * FEW; i += LANES) {
      vf high = splat(-INF);
      for (int64_t j = 0; j < here; j += FEW) {
        vf score = load(x + j * FEW + i) * factor;
        if (p.softcap > 0) score = capped(score, p.softcap) * LOG2E;
        if (here - j < FEW) score = (lane & (FEW - 1)) < int32_t(here - j) ? score : splat(-INF);
        store(x + j * FEW + i, score);
        high = score > high ? score : high;
      }
#pragma GCC unroll 2
      for (int distance = 1; distance < FEW; distance *= 2) {
        const vf other = __builtin_shuffle(high, lane ^ distance);
        high = other > high ? other : high;
      }
      vf old = load(top + r * FEW + i);
      const vi rises = high > old;
      if (highest_lane(rises ? splat(1.0f) : vf{}) > 0) {
        high = rises ? high : old;
        const vf shrink = rises ? exp2v(old - high) : splat(1.0f);
        store(top + r * FEW + i, high);
        store(sum + r * FEW + i, load(sum + r * FEW + i) * shrink);
        for (int n = 0; n < LANES / FEW && i / FEW + n < R; ++n) {
          float* row = out + (r + i / FEW + n) * p.value_dim;
          for (int64_t e = 0; e < p.value_dim; e += LANES) store(row + e, load(row + e) * shrink[n * FEW]);
        }
        old = high;
      }
      const vf shift = old == -INF ? vf{} : old;
      vf total = load(sum + r * FEW + i);
      for (int64_t j = 0; j < here; j += FEW) {
        const vf weight = exp2v(load(x + j * FEW + i) - shift);
        total += weight;
        store(x + j * FEW + i, weight);
      }
      store(sum + r * FEW + i, total);
    }
  }
};

// Joins the results of a list's stretches, of which `u` is any, in order; the first becomes the sum.
template <int32_t STORAGE>
static void join_stretches(const Gather& p, const Stretch& u, float* partials, int64_t parts) {
  const int64_t share = p.heads / p.list_heads, all = Picker<STORAGE>::rows_of(p), size = Picker<STORAGE>::partial(p);
  int64_t members = p.queries - u.n * p.list_group;
  if (members > p.list_group) members = p.list_group;
  for (int64_t r = 0; r < share * members; ++r) {
    const int64_t head = u.t * share + r / members;
    const int64_t row = (u.b * p.heads + head) * p.queries + u.n * p.list_group + r % members;
    const float* tops = partials + all * p.value_dim + r;
    const float *sums = tops + all, sink = p.sinks ? p.sinks[head] * LOG2E : -INF;
    float high = sink;
    for (int64_t c = 0; c < parts; ++c)
      if (tops[c * size] > high) high = tops[c * size];
    const float shift = high == -INF ? 0.0f : high;
    float total = p.sinks ? exp2v(splat(sink - shift))[0] : 0.0f;
    float* into = partials + r * p.value_dim;
    for (int64_t c = 0; c < parts; ++c) {
      const float weight = exp2v(splat(tops[c * size] - shift))[0], *part = into + c * size;
      total += weight * sums[c * size];
      for (int64_t e = 0; e < p.value_dim; e += LANES)
        store(into + e, (c ? load(into + e) : vf{}) + load(part + e) * weight);
    }
    const float fraction = total == 0 ? 0.0f : 1.0f / total;
    char* out = static_cast<char*>(p.out) + row * p.value_dim * (STORAGE == FP32 ? 4 : 2);
    for (int64_t e = 0; e < p.value_dim; e += LANES) store_some(out, e, LANES, STORAGE, load(into + e) * fraction);
    p.lse[row] = total == 0 ? -INF : high * LN2 + __builtin_logf(total);
  }
}

// f<STORAGE>()
template <class F>
INLINE auto with_storage(const Gather& p, F f) {
  switch (p.storage) {
    case FP32: return f.template operator()<FP32>();
    case BF16: return f.template operator()<BF16>();
    default: return f.template operator()<FP16>();
  }
}

static const GatherEngine GATHER = {
    .scratch = [](const Gather& p) { return Picker<FP32>::scratch(p); },
    .partial = [](const Gather& p) { return Picker<FP32>::partial(p); },
    .run = [](const Gather& p, const Stretch& u, char* memory, float* result) {
      return with_storage(p, [&]<int32_t STORAGE>() { return Picker<STORAGE>(p, u, memory, result).run(); });
    },
    .join = [](const Gather& p, const Stretch& u, float* partials, int64_t parts) {
      with_storage(p, [&]<int32_t STORAGE>() { join_stretches<STORAGE>(p, u, partials, parts); });
    },
};

}  // namespace saccade::SACCADE_ISA
