// Attention of few queries, bound by memory: each key and value is read once, for all the queries that share it.
//
// Vectors lie along the head dim, so that rows of any layout are read in place (or, where they are stored in few bits,
// widened into a tile that stays in cache). A register block is a few rows of queries by a few keys; its sums across lanes
// are taken for a whole vector of (query, key) pairs at once. Softmax goes along the keys.
#pragma once
#include "attend.hpp"
#include "codes.hpp"
#include "problem_decode.hpp"

namespace saccade::SACCADE_ISA {

constexpr int SLICE = 64;  // keys of a tile
constexpr int ROWS = 64;  // queries of a unit, at most

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

// What memory should bring while other rows are worked on: rows are used in the order `now`, then `then`, and asked for
// AHEAD of their use, evenly, so that memory neither idles nor has more to do than it can queue.
constexpr int AHEAD = 32;

struct Ahead {
  const char *const *now, *const *then;
  int now_count, then_count;
  int64_t now_bytes, then_bytes;

  // At the use of row j: of the row AHEAD of it the lines of bytes from .. to - 1.
  __attribute__((always_inline)) void fetch(int j, int64_t from, int64_t to) const {
    j += AHEAD;
    const char* row;
    if (j < now_count) {
      row = now[j];
      to = to < now_bytes ? to : now_bytes;
    } else if (j - now_count < then_count) {
      row = then[j - now_count];
      to = to < then_bytes ? to : then_bytes;
    } else {
      return;
    }
    const char* end = row + to + (reinterpret_cast<uintptr_t>(row) & 63);
    for (const char* line = row + from; line < end; line += 64) __builtin_prefetch(line);
  }
  __attribute__((always_inline)) void fetch(int j) const { fetch(j, 0, now_bytes > then_bytes ? now_bytes : then_bytes); }
};

// Lane i: the sum over the lanes of acc[i].
INLINE vf sums_of(vf* acc) {
  vi lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2) {
    vi upper = (lane & half) != 0;
    vi other = (lane ^ half) + (upper & LANES);  // the partner lane, of the second vector where `upper`
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      vf a = acc[i], b = acc[i + half];
      acc[i] = (upper ? b : a) + __builtin_shuffle(a, b, other);
    }
  }
  return acc[0];
}

// out[r][j] = queries[r] . keys[j] for R queries and LANES / R keys.
template <class Op, int R>
INLINE void dots(const typename Op::element* const* keys, const typename Op::element* queries, int64_t depth, float* out) {
  constexpr int KEYS = LANES / R;
  const int count = vectors(depth);
  vf acc[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) acc[i] = vf{};
  for (int s = 0; s < count; ++s) {
    const int64_t at = place(depth, s);
    typename Op::vector key[KEYS];
#pragma GCC unroll 16
    for (int j = 0; j < KEYS; ++j) key[j] = Op::take(keys[j] + at);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      typename Op::vector query = Op::take(queries + r * int64_t(count) * LANES + s * LANES);
#pragma GCC unroll 16
      for (int j = 0; j < KEYS; ++j) acc[r * KEYS + j] = Op::multiply(acc[r * KEYS + j], key[j], query);
    }
  }
  float sums[LANES];
  store(sums, sums_of(acc));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) __builtin_memcpy(out + r * SLICE, sums + r * KEYS, KEYS * sizeof(float));
}

// out[r] = out[r] * factor[r] + sum over j of weights[r][j] * values[j], on V vectors of channels from the `first` on.
template <class Op, int R, int V>
INLINE void weigh(const typename Op::element* const* values, int count, int64_t depth, int first,
                  const typename Op::element* weights, const float* factor, float* out, const Ahead* ahead) {
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
    if (ahead) ahead->fetch(j, first * LANES * 4, (first + V) * LANES * 4);
    typename Op::vector value[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) value[v] = Op::take(values[j] + at[v]);
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
                         const float* factor, float* out, const Ahead* ahead) {
  vf acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = load(out + r * depth + (first + v) * LANES) * factor[r];
  for (int j = 0; j < count; ++j) {
    for (int i = 2 * j; ahead && i < 2 * j + 2; ++i) ahead->fetch(i, first * LANES * 2, (first + V) * LANES * 2);
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
                             const float* factor, float* out, const Ahead* ahead) {
  const int all = int(depth / LANES);
  int v = 0;
  for (; v + 4 <= all; v += 4) weigh_halves<R, 4>(values, count, depth, v, weights, factor, out, ahead);
  for (; v < all; v += 2) weigh_halves<R, 2>(values, count, depth, v, weights, factor, out, ahead);
}

template <class Op, int R>
INLINE void weigh_all(const typename Op::element* const* values, int count, int64_t depth,
                      const typename Op::element* weights, const float* factor, float* out, const Ahead* ahead) {
  constexpr int MOST = LANES == 16 ? (R == 4 ? 4 : 8) : 8 / R;  // accumulators that fit the registers
  const int all = vectors(depth);
  int v = 0;
  for (; v + MOST <= all; v += MOST) weigh<Op, R, MOST>(values, count, depth, v, weights, factor, out, ahead);
  if constexpr (MOST > 4)
    for (; v + 4 <= all; v += 4) weigh<Op, R, 4>(values, count, depth, v, weights, factor, out, ahead);
  if constexpr (MOST > 2)
    for (; v + 2 <= all; v += 2) weigh<Op, R, 2>(values, count, depth, v, weights, factor, out, ahead);
  for (; v < all; ++v) weigh<Op, R, 1>(values, count, depth, v, weights, factor, out, ahead);
}

// The keys and values of a tile.
struct Batch {
  int count;
  int64_t position[SLICE];
  const char *key[SLICE], *value[SLICE];
  const float *key_scale[SLICE], *key_zero[SLICE], *value_scale[SLICE], *value_zero[SLICE];
};

template <class Op>
class Stream {
  typedef typename Op::element element;
  static constexpr int PER = Op::PER_ELEMENT;

 public:
  static bool in_place(int64_t dim, int32_t storage) {  // keys; values too, but for pairs
    return storage == (PER == 1 ? int32_t(FP32) : int32_t(BF16)) && dim % PER == 0 && dim >= PER * LANES;
  }
  static int64_t key_depth(const Decode& p) {
    return in_place(p.a.dim, p.kv_storage) ? p.a.dim / PER : padded((p.a.dim + PER - 1) / PER);
  }
  static int64_t value_depth(const Decode& p) {
    return PER == 1 && in_place(p.a.value_dim, p.kv_storage) ? p.a.value_dim : padded(p.a.value_dim);
  }

  // Bytes of scratch; with `memory` also lays it out there.
  static int64_t lay_out(const Decode& p, int64_t rows, char* memory, Stream* self) {
    int64_t used = 0;
    auto take = [&](int64_t words) {
      char* found = memory + used;
      used += (words * 4 + 63) / 64 * 64;
      return found;
    };
    const int64_t keys = key_depth(p), values = value_depth(p);
    char* parts[] = {take(rows * padded(keys)), take(rows * SLICE), take(rows * SLICE), take(SLICE * padded(keys)),
                     take(SLICE * padded(values)), take(padded(values)), take(rows)};
    if (self) {
      self->queries = reinterpret_cast<element*>(parts[0]);
      self->scores = reinterpret_cast<float*>(parts[1]);
      self->weights = reinterpret_cast<uint16_t*>(parts[2]);
      self->keys = reinterpret_cast<element*>(parts[3]);
      self->values = reinterpret_cast<element*>(parts[4]);
      self->zeros = reinterpret_cast<element*>(parts[5]);
      self->factor = reinterpret_cast<float*>(parts[6]);
    }
    return used;
  }

  Stream(const Decode& problem, const Part& part, char* memory, float* partial)
      : p(problem), u(part), depth(key_depth(problem)), channels(value_depth(problem)) {
    lay_out(p, u.count, memory, this);
    share = p.a.heads / p.list_heads;
    head = u.t * share;
    g = head / (p.a.heads / p.a.kv_heads);
    members = p.a.queries - u.n * p.list_group;
    if (members > p.list_group) members = p.list_group;
    tokens = p.lengths ? p.lengths[u.b * p.a.kv_heads + g] : p.a.keys;
    outputs = partial;
    top = partial + u.count * padded(p.a.value_dim);
    sum = top + u.count;
  }

  void run() {
    for (int64_t r = 0; r < u.count; ++r) {
      top[r] = -INF;
      sum[r] = 0;
    }
    int64_t start = u.start, end = u.end;
    if (!p.lists) {
      int64_t low = tokens, high = 0;
      for (int64_t r = 0; r < u.count; ++r) {
        if (lowest(r) < low) low = lowest(r);
        if (highest(r) + 1 > high) high = highest(r) + 1;
      }
      start = start > low ? start : low;
      end = end < high ? end : high;
    }
    for (int64_t i = 0; i < u.count * vectors(channels) * LANES; ++i) outputs[i] = 0;
    if (start >= end) return;
    for (int64_t e = 0; e < padded(channels); ++e) zeros[e] = 0;
    pack_queries();
    Batch batches[2];
    int64_t next = fill(batches[0], start, end);
    for (int now = 0; batches[now].count; now = !now) {
      next = fill(batches[!now], next, end);
      tile(batches[now], batches[!now]);
    }
  }

 private:
  const Decode& p;
  const Part& u;
  const int64_t depth, channels;  // elements of a key and of a value as the products see them
  int64_t share, head, g, members, tokens;
  element *queries, *keys, *values, *zeros;
  float *scores, *factor, *outputs, *top, *sum;
  uint16_t* weights;

  int64_t query_of(int64_t r) const { return u.n * p.list_group + (u.first + r) % members; }
  int64_t head_of(int64_t r) const { return head + (u.first + r) / members; }
  int64_t lowest(int64_t r) const {
    int64_t key = query_of(r) + tokens - p.a.queries - p.a.left;
    return p.a.left < 0 || key < 0 ? 0 : key;
  }
  int64_t highest(int64_t r) const {
    int64_t key = query_of(r) + tokens - p.a.queries + p.a.right;
    return p.a.right < 0 || key >= tokens ? tokens - 1 : key;
  }

  // The next keys from slot `slot` on; the slot after them.
  int64_t fill(Batch& batch, int64_t slot, int64_t end) const {
    const int64_t* list = nullptr;
    if (p.lists) list = p.lists + u.b * p.list_stride[0] + u.t * p.list_stride[1] + u.n * p.list_stride[2];
    int count = 0;
    for (; slot < end && count < SLICE; ++slot) {
      int64_t at = list ? list[slot] : slot;
      if (at >= 0) batch.position[count++] = at;
    }
    batch.count = count;
    const int64_t *table = p.table ? p.table + u.b * p.table_stride[0] + g * p.table_stride[1] : nullptr;
    const int64_t bytes = p.kv_storage == FP32 ? 4 : p.kv_storage == INT8 || p.kv_storage == INT4 ? 1 : 2;
    const int64_t key_step = p.a.k.row_stride * bytes, value_step = p.a.v.row_stride * bytes, size = p.page_size;
    const char *key = static_cast<const char*>(p.a.k.data), *value = static_cast<const char*>(p.a.v.data);
    if (!table) {
      key += (u.b * p.a.k.batch_stride + g * p.a.k.head_stride) * bytes;
      value += (u.b * p.a.v.batch_stride + g * p.a.v.head_stride) * bytes;
      for (int j = 0; j < count; ++j) {
        batch.key[j] = key + batch.position[j] * key_step;
        batch.value[j] = value + batch.position[j] * value_step;
      }
      return slot;
    }
    for (int64_t j = 0, first = 0, entry = -1; j < count; ++j) {
      if (entry < 0 || batch.position[j] < first || batch.position[j] >= first + size) {
        entry = batch.position[j] / size;
        first = entry * size;
      }
      const int64_t page = table[entry], row = batch.position[j] - first;
      batch.key[j] = key + page * p.a.k.batch_stride * bytes + row * key_step;
      batch.value[j] = value + page * p.a.v.batch_stride * bytes + row * value_step;
      if (p.k_scales.scale) {
        const int64_t ks = page * p.k_scales.page_stride + row * p.k_scales.row_stride;
        const int64_t vs = page * p.v_scales.page_stride + row * p.v_scales.row_stride;
        batch.key_scale[j] = p.k_scales.scale + ks;
        batch.value_scale[j] = p.v_scales.scale + vs;
        batch.key_zero[j] = p.k_scales.zero ? p.k_scales.zero + ks : nullptr;
        batch.value_zero[j] = p.v_scales.zero ? p.v_scales.zero + vs : nullptr;
      }
    }
    return slot;
  }

  int64_t row_bytes(int64_t dim) const {
    switch (p.kv_storage) {
      case FP32: return dim * 4;
      case INT8: return dim;
      case INT4: return dim / 2;
      default: return dim * 2;
    }
  }

  void pack_queries() {
    const int count = vectors(depth);
    for (int64_t r = 0; r < u.count; ++r) {
      const char* row = row_of(p.a.q, u.b, head_of(r), query_of(r), p.a.storage);
      element* out = queries + r * count * LANES;
      for (int s = 0; s < count; ++s)
        for (int i = 0; i < LANES; ++i) {
          const int64_t at = place(depth, s) + i;
          element x = 0;
          if (at >= int64_t(s) * LANES) {  // else the vector before has it
            if constexpr (PER == 1) {
              if (at < p.a.dim) x = read(row, at, p.a.storage);
            } else {
              const uint16_t* half = reinterpret_cast<const uint16_t*>(row);
              if (2 * at < p.a.dim) x = half[2 * at];
              if (2 * at + 1 < p.a.dim) x |= uint32_t(half[2 * at + 1]) << 16;
            }
          }
          out[s * LANES + i] = x;
        }
    }
  }

  void tile(const Batch& batch, const Batch& coming) {
    const element *key[SLICE], *value[SLICE];
    const int64_t key_bytes = row_bytes(p.a.dim), value_bytes = row_bytes(p.a.value_dim);
    const bool key_in_place = in_place(p.a.dim, p.kv_storage);
    const int64_t key_stride = padded(depth), value_stride = padded(channels);
    const Ahead keys_ahead = {batch.key, batch.value, batch.count, batch.count, key_bytes, value_bytes};
    const Ahead values_ahead = {batch.value, coming.key, batch.count, coming.count, value_bytes, key_bytes};
    for (int j = 0; j < batch.count; ++j) {
      if (!key_in_place) {
        if constexpr (PER == 1)
          widen_row_of(batch.key[j], p.a.dim, p.kv_storage, batch.key_scale[j], batch.key_zero[j], p.k_scales.group, key_stride,
                      keys + j * key_stride);
        else
          narrow_codes(batch.key[j], p.a.dim, p.kv_storage, batch.key_scale[j], batch.key_zero[j], p.k_scales.group,
                       2 * key_stride, reinterpret_cast<uint16_t*>(keys + j * key_stride));
        keys_ahead.fetch(j);
      }
      key[j] = key_in_place ? reinterpret_cast<const element*>(batch.key[j]) : keys + j * key_stride;
    }
    const int whole = (batch.count + LANES - 1) / LANES * LANES;
    for (int j = batch.count; j < whole; ++j) key[j] = key[0];
    score(key, whole, key_in_place ? &keys_ahead : nullptr);
    const bool masked = soften_rows(batch, whole);
    bool poisoned[SLICE];
    bool poison = false;
    if (masked)
      for (int j = 0; j < batch.count; ++j) poison |= poisoned[j] = is_poisoned(batch, j);
    if constexpr (PER == 1) {
      const bool value_in_place = in_place(p.a.value_dim, p.kv_storage);
      for (int j = 0; j < batch.count; ++j) {
        if (!value_in_place) {
          values_ahead.fetch(j);
          widen_row_of(batch.value[j], p.a.value_dim, p.kv_storage, batch.value_scale[j], batch.value_zero[j], p.v_scales.group,
                      value_stride, values + j * value_stride);
        }
        value[j] = value_in_place ? reinterpret_cast<const float*>(batch.value[j]) : values + j * value_stride;
        if (poison && poisoned[j]) value[j] = zeros;
      }
    } else if (values_in_halves()) {
      for (int j = 0; j < batch.count; ++j) {
        value[j] = poison && poisoned[j] ? zeros : reinterpret_cast<const element*>(batch.value[j]);
      }
      if (batch.count % 2) value[batch.count] = zeros;
    } else {
      for (int j = 0; j < batch.count; j += 2) {
        for (int i = j; i < j + 2; ++i) values_ahead.fetch(i);
        bool even = !(poison && poisoned[j]), odd = j + 1 < batch.count && !(poison && poisoned[j + 1]);
        const int o = odd ? j + 1 : j;
        pair_codes(even ? batch.value[j] : nullptr, odd ? batch.value[o] : nullptr, p.a.value_dim, p.kv_storage,
                   batch.value_scale[j], batch.value_zero[j], batch.value_scale[o], batch.value_zero[o], p.v_scales.group,
                   value_stride, values + j / 2 * value_stride);
        value[j / 2] = values + j / 2 * value_stride;
      }
    }
    const bool direct = PER == 1 ? in_place(p.a.value_dim, p.kv_storage) : values_in_halves();
    add_values(value, (batch.count + PER - 1) / PER, direct ? &values_ahead : nullptr);
    if (poison) add_poison(batch, poisoned);
  }

  void score(const element* const* key, int whole, const Ahead* ahead) {
    const int64_t stride = int64_t(vectors(depth)) * LANES;
    int64_t r = 0;
    auto block = [&]<int R>() {
      constexpr int KEYS = LANES / R;
      for (int j = 0; j < whole; j += KEYS) {
        for (int i = j; ahead && r == 0 && i < j + KEYS; ++i) ahead->fetch(i);
        dots<Op, R>(key + j, queries + r * stride, depth, scores + r * SLICE + j);
      }
      r += R;
    };
    while (r + 4 <= u.count) block.template operator()<4>();
    if (r + 2 <= u.count) block.template operator()<2>();
    if (r < u.count) block.template operator()<1>();
  }

  void add_values(const element* const* value, int count, const Ahead* ahead) {
    const int64_t stride = int64_t(vectors(channels)) * LANES;
    int64_t r = 0;
    auto block = [&]<int R>() {
      const element* weight;
      if constexpr (PER == 1)
        weight = scores + r * SLICE;
      else
        weight = reinterpret_cast<const uint32_t*>(weights + r * SLICE);
      if constexpr (PER == 2) {
        if (values_in_halves()) {
          weigh_all_halves<R>(value, count, channels, weight, factor + r, outputs + r * stride, r ? nullptr : ahead);
          r += R;
          return;
        }
      }
      weigh_all<Op, R>(value, count, channels, weight, factor + r, outputs + r * stride, r ? nullptr : ahead);
      r += R;
    };
    while (r + 4 <= u.count) block.template operator()<4>();
    if (r + 2 <= u.count) block.template operator()<2>();
    if (r < u.count) block.template operator()<1>();
  }

  // Whether values are paired in registers: no dearer than a tile of pairs as long as few rows need them.
  bool values_in_halves() const {
    return PER == 2 && p.kv_storage == BF16 && p.a.value_dim % (2 * LANES) == 0 && u.count <= 8;
  }

  // Scores of each row become weights; whether some key was hidden from some row.
  bool soften_rows(const Batch& batch, int whole) {
    const bool plain = p.a.softcap == 0 && !p.a.bias && !p.a.alibi;
    bool any = false;
    for (int64_t r = 0; r < u.count; ++r) {
      float* row = scores + r * SLICE;
      const float scale = plain ? p.a.scale * LOG2E : p.a.scale;
      for (int j = 0; j < whole; j += LANES) store(row + j, load(row + j) * scale);
      if (!plain) transform(row, r, batch, whole);
      any |= hide(row, r, batch);
      for (int j = batch.count; j < whole; ++j) row[j] = -INF;
      vf most = splat(-INF);
      for (int j = 0; j < whole; j += LANES) most = load(row + j) > most ? load(row + j) : most;
      float high = highest_lane(most);
      high = high > top[r] ? high : top[r];
      const float shift = high == -INF ? 0.0f : high;
      vf total = {};
      for (int j = 0; j < whole; j += LANES) {
        vf weight = exp2v(load(row + j) - shift);
        total += weight;
        if constexpr (PER == 1)
          store(row + j, weight);
        else
          *reinterpret_cast<vh_any*>(weights + r * SLICE + j) = narrow_bf16(weight);
      }
      factor[r] = exp2v(splat(top[r] - shift))[0];
      sum[r] = sum[r] * factor[r] + sum_of_lanes(total);
      top[r] = high;
    }
    return any;
  }

  void transform(float* row, int64_t r, const Batch& batch, int whole) {
    if (p.a.softcap > 0)
      for (int j = 0; j < whole; j += LANES) store(row + j, capped(load(row + j), p.a.softcap));
    if (p.a.alibi) {
      const int64_t place = query_of(r) + tokens - p.a.queries;
      const float slope = p.a.alibi[head_of(r)];
      for (int j = 0; j < batch.count; ++j) {
        float distance = float(place - batch.position[j]);
        row[j] -= slope * (distance < 0 ? -distance : distance);
      }
    }
    if (p.a.bias) {
      const float* bias = p.a.bias + u.b * p.a.bias_stride[0] + head_of(r) * p.a.bias_stride[1] + query_of(r) * p.a.bias_stride[2];
      for (int j = 0; j < batch.count; ++j) {  // -inf hides, whatever the score
        float x = bias[batch.position[j] * p.a.bias_stride[3]];
        row[j] = x == -INF ? x : row[j] + x;
      }
    }
    for (int j = 0; j < whole; j += LANES) store(row + j, load(row + j) * LOG2E);
  }

  bool hide(float* row, int64_t r, const Batch& batch) const {
    const int64_t low = lowest(r), high = highest(r), last = batch.count - 1;
    bool any = p.a.bias != nullptr;
    if (p.lists || batch.position[0] < low || batch.position[last] > high)
      for (int j = 0; j < batch.count; ++j)
        if (batch.position[j] < low || batch.position[j] > high) {
          row[j] = -INF;
          any = true;
        }
    if (p.a.q_segments) {
      const int32_t own = p.a.q_segments[u.b * p.a.q_segment_stride + query_of(r)];
      for (int j = 0; j < batch.count; ++j)
        if (own < 0 || p.a.kv_segments[u.b * p.a.kv_segment_stride + batch.position[j]] != own) {
          row[j] = -INF;
          any = true;
        }
    }
    return any;
  }

  // Whether a row of queries sees a key of the tile; a score of -inf does not tell, it may be visible.
  bool sees(int64_t r, const Batch& batch, int j) const {
    const int64_t at = batch.position[j];
    if (at < lowest(r) || at > highest(r)) return false;
    if (p.a.q_segments) {
      const int32_t own = p.a.q_segments[u.b * p.a.q_segment_stride + query_of(r)];
      if (own < 0 || p.a.kv_segments[u.b * p.a.kv_segment_stride + at] != own) return false;
    }
    if (!p.a.bias) return true;
    const float* bias = p.a.bias + u.b * p.a.bias_stride[0] + head_of(r) * p.a.bias_stride[1] + query_of(r) * p.a.bias_stride[2];
    return bias[at * p.a.bias_stride[3]] != -INF;
  }

  float value_at(const Batch& batch, int j, int64_t e) const {
    return read_code(batch.value[j], e, p.a.value_dim, p.kv_storage, batch.value_scale[j], batch.value_zero[j], p.v_scales.group);
  }

  bool is_poisoned(const Batch& batch, int j) const {
    if (p.kv_storage == FP32) return has_poison(reinterpret_cast<const float*>(batch.value[j]), p.a.value_dim);
    for (int64_t e = 0; e < p.a.value_dim; ++e)
      if (value_at(batch, j, e) * 0.0f != 0) return true;
    return false;
  }

  // Adds the values that were set apart to the rows that see them.
  void add_poison(const Batch& batch, const bool* poisoned) {
    const int count = vectors(channels);
    for (int j = 0; j < batch.count; ++j)
      for (int64_t r = 0; poisoned[j] && r < u.count; ++r) {
        const float weight = PER == 1 ? scores[r * SLICE + j] : read(reinterpret_cast<const char*>(weights + r * SLICE), j, BF16);
        if (!sees(r, batch, j)) continue;
        for (int v = 0; v < count; ++v)
          for (int i = 0; i < LANES; ++i) {
            const int64_t e = place(channels, v) + i;
            if (e < p.a.value_dim) outputs[(r * count + v) * LANES + i] += weight * value_at(batch, j, e);
          }
      }
  }
};

INLINE bool works_in_pairs(const Decode& p) {
  return HAS_BF16_DOT && p.a.storage == BF16 && (p.kv_storage == BF16 || p.kv_storage == INT8 || p.kv_storage == INT4);
}

INLINE int64_t channels_of(const Decode& p) {
  return works_in_pairs(p) ? Stream<HalfPairs>::value_depth(p) : Stream<Floats>::value_depth(p);
}

// Joins the results of `parts` stretches of keys; `u` is any of them.
static void join(const Decode& p, const Part& u, const float* partials, int64_t partial_size, int64_t parts) {
  const int64_t share = p.a.heads / p.list_heads, depth = channels_of(p), stride = padded(depth);
  int64_t members = p.a.queries - u.n * p.list_group;
  if (members > p.list_group) members = p.list_group;
  for (int64_t r = 0; r < u.count; ++r) {
    const int64_t query = u.n * p.list_group + (u.first + r) % members, head = u.t * share + (u.first + r) / members;
    const int64_t row = (u.b * p.a.heads + head) * p.a.queries + query;
    float* out = p.a.out + row * p.a.value_dim;
    const float* tops = partials + u.count * padded(p.a.value_dim) + r;
    float high = -INF, total = 0;
    for (int64_t c = 0; c < parts; ++c)
      if (tops[c * partial_size] > high) high = tops[c * partial_size];
    for (int64_t e = 0; e < p.a.value_dim; ++e) out[e] = 0;
    const float shift = high == -INF ? 0.0f : high;
    for (int64_t c = 0; c < parts; ++c) {
      const float sum = tops[c * partial_size + u.count];
      const float weight = exp2v(splat(tops[c * partial_size] - shift))[0];
      const float* part = partials + c * partial_size + r * stride;
      total += weight * sum;
      for (int v = 0; v < vectors(depth); ++v) {
        const int64_t at = place(depth, v);
        for (int i = int(v * LANES - at); i < LANES && at + i < p.a.value_dim; ++i) out[at + i] += weight * part[v * LANES + i];
      }
    }
    const float fraction = total == 0 ? 0.0f : 1.0f / total;
    for (int64_t e = 0; e < p.a.value_dim; ++e) out[e] *= fraction;
    p.a.lse[row] = total == 0 ? -INF : high * LN2 + __builtin_logf(total);
  }
}

}  // namespace saccade::SACCADE_ISA
