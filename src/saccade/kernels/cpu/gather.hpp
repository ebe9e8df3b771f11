// Attention of few queries over lists of keys, bound by the walk from row to row: rows lie far apart, so that each costs a
// translation of its address besides its lines. The list says early which rows come, so that they are asked for many tokens
// ahead, evenly; none is copied, and each is read once for all the queries that share it.
//
// Vectors lie along the head dim. Softmax is kept for four queries by four tokens, all in one vector where it has 16 lanes.
// The products take rows by pointers, however these were found.
#pragma once
#include "decode.hpp"
#include "problem_gather.hpp"
#include "scan_rows.hpp"

namespace saccade::SACCADE_ISA {

constexpr int FEW = 4;               // tokens, and queries, that are worked on together
constexpr int PAIRS = FEW * FEW;     // their scores
constexpr int SOONER = 64;           // tokens between asking for a row and loading it: their rows wait in the second cache

template <int32_t STORAGE>
INLINE vf take_row(const char* row, int64_t d) {
  if constexpr (STORAGE == FP32) return load(reinterpret_cast<const float*>(row) + d);
  const vh half = *reinterpret_cast<const vh_any*>(row + 2 * d);
  return STORAGE == BF16 ? widen_bf16(half) : widen_fp16(half);
}

// scores[r][j] = queries[r] . keys[j] for R <= FEW queries; other rows of `scores` become 0.
template <int32_t STORAGE, int R>
INLINE void few_dots(const char* const* keys, const float* queries, int64_t dim, float* scores) {
  constexpr int T = LANES / FEW;  // tokens whose sums fill one vector
  for (int first = 0; first < FEW; first += T) {
    vf acc[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) acc[i] = vf{};
    for (int64_t d = 0; d < dim; d += LANES) {
      vf key[T];
#pragma GCC unroll 4
      for (int j = 0; j < T; ++j) key[j] = take_row<STORAGE>(keys[first + j], d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vf query = load(queries + r * dim + d);
#pragma GCC unroll 4
        for (int j = 0; j < T; ++j) acc[r * T + j] += key[j] * query;
      }
    }
    float sums[LANES];
    store(sums, sums_of(acc));
#pragma GCC unroll 4
    for (int r = 0; r < FEW; ++r) __builtin_memcpy(scores + r * FEW + first, sums + r * T, T * sizeof(float));
  }
}

// out[r] += sum over j of weights[r][j] * values[j]
template <int32_t STORAGE, int R>
INLINE void few_values(const char* const* values, const float* weights, int64_t dim, float* out) {
  vf weight[R][FEW];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < FEW; ++j) weight[r][j] = splat(weights[r * FEW + j]);
  for (int64_t e = 0; e < dim; e += LANES) {
    vf value[FEW];
#pragma GCC unroll 4
    for (int j = 0; j < FEW; ++j) value[j] = take_row<STORAGE>(values[j], e);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vf acc = load(out + r * dim + e);
#pragma GCC unroll 4
      for (int j = 0; j < FEW; ++j) acc += weight[r][j] * value[j];
      store(out + r * dim + e, acc);
    }
  }
}

// One list's stretch for all the queries that share it.
template <int32_t STORAGE>
class Picker {
 public:
  static int64_t rows_of(const Gather& p) { return round_up(p.heads / p.list_heads * p.list_group, FEW); }
  static int64_t partial(const Gather& p) { return round_up(rows_of(p) * (p.value_dim + 2), 16); }
  static int64_t scratch(const Gather& p) {
    return MOST_SLOTS * 8 + (round_up(rows_of(p) * p.dim, 16) + rows_of(p) / FEW * 2 * PAIRS) * 4;
  }

  Picker(const Gather& problem, const Stretch& unit, char* memory, float* result)
      : p(problem), u(unit), share(p.heads / p.list_heads), all(rows_of(p)) {
    members = p.queries - u.n * p.list_group;
    if (members > p.list_group) members = p.list_group;
    rows = share * members;
    position = reinterpret_cast<int64_t*>(memory);
    queries = reinterpret_cast<float*>(memory + MOST_SLOTS * 8);
    top = queries + round_up(all * p.dim, 16);
    sum = top + all / FEW * PAIRS;
    out = result;
  }

  bool run() {
    if (!read_list()) return false;
    const int64_t g = u.t * share / (p.heads / p.kv_heads), bytes = STORAGE == FP32 ? 4 : 2;
    key = row_of(p.k, u.b, g, 0, STORAGE);
    value = row_of(p.v, u.b, g, 0, STORAGE);
    key_step = p.k.row_stride * bytes;
    value_step = p.v.row_stride * bytes;
    for (int64_t i = 0; i < rows; ++i) {
      const char* row = row_of(p.q, u.b, u.t * share + i / members, u.n * p.list_group + i % members, STORAGE);
      for (int64_t d = 0; d < p.dim; d += LANES) store(queries + i * p.dim + d, take_row<STORAGE>(row, d));
    }
    for (int64_t i = 0; i < rows * p.value_dim; ++i) out[i] = 0;
    for (int64_t i = 0; i < all / FEW * PAIRS; ++i) top[i] = -INF, sum[i] = 0;
    for (int64_t j = 0; j < SOONER; j += FEW) {
      ask(j, key, key_step, p.dim * bytes);
      ask(j, value, value_step, p.value_dim * bytes);
    }
    for (int64_t j = 0; j < count; j += FEW) tokens(j, count - j < FEW ? count - j : FEW);
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
  int64_t members, rows, count = 0, key_step = 0, value_step = 0;
  int64_t* position;           // of the keys that are seen
  float *queries, *top, *sum;  // [all][dim]; [all / FEW][PAIRS]: of each row, in base 2 and per token of four
  float* out;                  // [all][value_dim], then [all] tops and [all] sums
  const char *key = nullptr, *value = nullptr;

  bool read_list() {
    const int64_t* list = p.lists + u.b * p.list_stride[0] + u.t * p.list_stride[1] + u.n * p.list_stride[2];
    const int64_t end = p.causal ? u.n + p.keys - p.queries + 1 : p.keys;
    bool inside = true;
    for (int64_t slot = u.start; slot < u.end; ++slot) {
      const int64_t at = list[slot];
      inside &= at >= -1 && at < p.keys;
      position[count] = at;
      count += at >= 0 && at < end;
    }
    return inside;
  }

  // Asks for the rows of tokens j .. j + FEW - 1, as far as there are any.
  __attribute__((always_inline)) void ask(int64_t j, const char* rows, int64_t step, int64_t bytes) const {
    for (int64_t i = j; i < j + FEW && i < count; ++i) {
      const char* row = rows + position[i] * step;
      for (const char* at = row - (reinterpret_cast<uintptr_t>(row) & 63); at < row + bytes; at += 64)
        __builtin_prefetch(at, 0, 2);
    }
  }

  // `here` <= FEW tokens from j on; missing ones are the last one again, with no weight.
  void tokens(int64_t j, int64_t here) {
    const char *keys[FEW], *values[FEW];
    for (int64_t i = 0; i < FEW; ++i) {
      const int64_t at = position[j + (i < here ? i : here - 1)];
      keys[i] = key + at * key_step;
      values[i] = value + at * value_step;
    }
    const int64_t bytes = STORAGE == FP32 ? 4 : 2;
    ask(j + SOONER, key, key_step, p.dim * bytes);
    int64_t r = 0;
    for (; r + FEW <= rows; r += FEW) block<FEW>(keys, values, r, here);
    switch (rows - r) {
      case 3: block<3>(keys, values, r, here); break;
      case 2: block<2>(keys, values, r, here); break;
      case 1: block<1>(keys, values, r, here); break;
    }
    ask(j + SOONER, value, value_step, p.value_dim * bytes);
  }

  template <int R>
  inline __attribute__((always_inline)) void block(const char* const* keys, const char* const* values, int64_t r, int64_t here) {
    float x[PAIRS];
    few_dots<STORAGE, R>(keys, queries + r * p.dim, p.dim, x);
    soften<R>(x, r, here);
    few_values<STORAGE, R>(values, x, p.value_dim, out + r * p.value_dim);
  }

  // Scores become weights relative to the greatest score so far; where that rises, what was summed shrinks.
  template <int R>
  inline __attribute__((always_inline)) void soften(float* x, int64_t r, int64_t here) {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    const vf factor = splat(p.softcap > 0 ? p.scale : p.scale * LOG2E);
    for (int i = 0; i < R * FEW; i += LANES) {
      vf score = load(x + i) * factor;
      if (p.softcap > 0) score = capped(score, p.softcap) * LOG2E;
      if (here < FEW) score = (lane & (FEW - 1)) < int32_t(here) ? score : splat(-INF);
      vf high = __builtin_shuffle(score, lane ^ 1);
      high = score > high ? score : high;
      const vf other = __builtin_shuffle(high, lane ^ 2);
      high = other > high ? other : high;
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
      const vf weight = exp2v(score - (old == -INF ? vf{} : old));
      store(sum + r * FEW + i, load(sum + r * FEW + i) + weight);
      store(x + i, weight);
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
