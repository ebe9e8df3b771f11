// Attention of few queries, bound by memory: each key and value is read once, for all the queries that share it.
//
// Vectors lie along the head dim, so that rows of any layout are read in place, and widened in registers where they are
// stored in fewer bits (or in a tile that stays in cache, where many queries share them). A register block is a few rows
// of queries by a few keys; its sums across lanes are taken for a whole vector of (query, key) pairs at once. Softmax goes
// along the keys.
#pragma once
#include "attend.hpp"
#include "codes.hpp"
#include "problem_decode.hpp"

namespace saccade::SACCADE_ISA {

constexpr int SLICE = 128;   // keys of a tile, at most
constexpr int ROWS = 64;     // queries of a unit, at most
constexpr int FEW_ROWS = 8;  // so many queries do not repay a tile of widened keys and values
constexpr int64_t REACH = 16384;  // bytes of the keys of a tile: see Ahead

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

// What memory should bring while other rows are worked on: the values of a tile while its scores are taken, the next keys
// while its values are weighed. A tile is some REACH bytes of keys: enough that what was asked for arrives in time, and
// little enough that it is still in the first cache then. Lines are asked for evenly, since memory takes a bounded queue of
// them, and in the order of their addresses, which the machine's own prefetchers continue.
class Ahead {
 public:
  Ahead(const char* const* rows, int count, int64_t bytes) : row(rows), last(rows + count), bytes(bytes) {}

  // A few lines are asked for in each of so many steps, such that all are when the steps are over.
  struct Pace {
    int mask, times;
  };
  Pace pace(int64_t steps) const {
    const int64_t all = portions();
    int period = 1;
    while (period < 8 && all * period * 2 <= steps) period *= 2;
    return {period - 1, int((all * period + steps - 1) / steps)};
  }
  __attribute__((always_inline)) void fetch(int step, Pace pace) {
    if (step & pace.mask) return;
    for (int i = 0; i < pace.times; ++i) fetch();
  }

 private:
  static constexpr int LINES = 4;  // of a portion
  const char *const *row, *const *last;
  int64_t bytes;
  const char *at = nullptr, *end = nullptr;

  // At least as many as there are; a row that does not begin with a line may take one more.
  int64_t portions() const {
    const int64_t rows = last - row;
    return rows ? (rows * ((bytes + (reinterpret_cast<uintptr_t>(*row) & 63) + 63) / 64) + LINES - 1) / LINES : 0;
  }
  __attribute__((always_inline)) void fetch() {
    if (end - at >= 64 * LINES) {
#pragma GCC unroll 4
      for (int i = 0; i < LINES; ++i) __builtin_prefetch(at + 64 * i);
      at += 64 * LINES;
      return;
    }
    for (int i = 0; i < LINES; ++i, at += 64) {
      if (at >= end) {
        if (row == last) return;
        const char* begin = *row++;
        end = begin + bytes;
        for (; row < last && *row == end; ++row) end += bytes;
        at = begin - (reinterpret_cast<uintptr_t>(begin) & 63);
      }
      __builtin_prefetch(at);
    }
  }
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
                 Ahead* ahead, Ahead::Pace pace) {
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
    if (ahead) ahead->fetch(s, pace);
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
                  const float* factor, float* out, Ahead* ahead, Ahead::Pace pace) {
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
    if (ahead) ahead->fetch(j, pace);
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
                         const float* factor, float* out, Ahead* ahead, Ahead::Pace pace) {
  vf acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = load(out + r * depth + (first + v) * LANES) * factor[r];
  for (int j = 0; j < count; ++j) {
    if (ahead) ahead->fetch(j, pace);
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
                             const float* factor, float* out, Ahead* ahead) {
  const int all = int(depth / LANES), passes = (all + 3) / 4;
  const Ahead::Pace pace = ahead ? ahead->pace(passes * int64_t(count)) : Ahead::Pace{};
  int v = 0;
  for (; v + 4 <= all; v += 4) weigh_halves<R, 4>(values, count, depth, v, weights, factor, out, ahead, pace);
  for (; v < all; v += 2) weigh_halves<R, 2>(values, count, depth, v, weights, factor, out, ahead, pace);
}

template <class Op, int R, class Source>
INLINE void weigh_all(const Source& values, int count, int64_t depth, const typename Op::element* weights, const float* factor,
                      float* out, Ahead* ahead) {
  constexpr int MOST = LANES == 16 ? (R == 4 ? 4 : 8) : 8 / R;  // accumulators that fit the registers
  const int all = vectors(depth), passes = (all + MOST - 1) / MOST;
  const Ahead::Pace pace = ahead ? ahead->pace(passes * int64_t(count)) : Ahead::Pace{};
  int v = 0;
  for (; v + MOST <= all; v += MOST) weigh<Op, R, MOST>(values, count, depth, v, weights, factor, out, ahead, pace);
  if constexpr (MOST > 4)
    for (; v + 4 <= all; v += 4) weigh<Op, R, 4>(values, count, depth, v, weights, factor, out, ahead, pace);
  if constexpr (MOST > 2)
    for (; v + 2 <= all; v += 2) weigh<Op, R, 2>(values, count, depth, v, weights, factor, out, ahead, pace);
  for (; v < all; ++v) weigh<Op, R, 1>(values, count, depth, v, weights, factor, out, ahead, pace);
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
  static constexpr int64_t MOST_VECTORS = 64;
  // Whether rows can be widened in registers: each vector has one scale and lies in one half.
  static bool in_registers(int64_t dim, int32_t storage, const Scales& scales) {
    if (PER != 1 || storage == FP32 || dim % LANES != 0) return false;
    if (storage == BF16 || storage == FP16) return true;
    if (scales.zero || scales.group % LANES != 0 || dim / LANES > MOST_VECTORS) return false;
    return storage == INT8 || dim / 2 % LANES == 0;
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
    few = u.count <= FEW_ROWS;
    key_in_place = in_place(p.a.dim, p.kv_storage);
    narrow_keys = few && in_registers(p.a.dim, p.kv_storage, p.k_scales);
    narrow_values = few && in_registers(p.a.value_dim, p.kv_storage, p.v_scales);
    slots = SLICE / 2;
    if (key_in_place || narrow_keys) {
      slots = REACH / row_bytes(p.a.dim) / LANES * LANES;
      const int64_t most = few ? SLICE : SLICE / 2;
      slots = slots < 16 ? 16 : slots > most ? most : slots;
    }
    if (narrow_keys) number_groups(p.a.dim, p.k_scales.group, key_group);
    if (narrow_values) number_groups(p.a.value_dim, p.v_scales.group, value_group);
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
  bool few, key_in_place, narrow_keys, narrow_values;
  int64_t slots;  // keys of a tile
  uint8_t key_group[MOST_VECTORS], value_group[MOST_VECTORS];

  void number_groups(int64_t dim, int64_t group, uint8_t* numbers) const {
    if (p.kv_storage != INT8 && p.kv_storage != INT4) return;
    for (int64_t d = 0; d < dim; d += LANES) numbers[d / LANES] = uint8_t(d / group);
  }

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
    int count = 0;
    if (p.lists) {
      const int64_t* list = p.lists + u.b * p.list_stride[0] + u.t * p.list_stride[1] + u.n * p.list_stride[2];
      for (; slot < end && count < slots; ++slot)
        if (list[slot] >= 0) batch.position[count++] = list[slot];
    } else {
      for (; slot < end && count < slots; ++slot) batch.position[count++] = slot;
    }
    batch.count = count;
    const int64_t bytes = p.kv_storage == FP32 ? 4 : p.kv_storage == INT8 || p.kv_storage == INT4 ? 1 : 2;
    if (!p.table) {
      find(batch, 0, count, 0, (u.b * p.a.k.batch_stride + g * p.a.k.head_stride) * bytes,
           (u.b * p.a.v.batch_stride + g * p.a.v.head_stride) * bytes, bytes);
    } else {
      const int64_t* table = p.table + u.b * p.table_stride[0] + g * p.table_stride[1];
      for (int from = 0, to; from < count; from = to) {  // the keys of one page
        const int64_t entry = batch.position[from] / p.page_size, first = entry * p.page_size, page = table[entry];
        for (to = from + 1; to < count && batch.position[to] >= first && batch.position[to] < first + p.page_size;) ++to;
        find(batch, from, to, first, page * p.a.k.batch_stride * bytes, page * p.a.v.batch_stride * bytes, bytes);
        if (p.k_scales.scale) find_scales(batch, from, to, first, page);
      }
    }
    pad(batch);
    return slot;
  }

  // Where keys from .. to - 1 of a batch lie; position `first` is that of the row at the offsets, in bytes.
  void find(Batch& batch, int from, int to, int64_t first, int64_t key_offset, int64_t value_offset, int64_t bytes) const {
    const int64_t key_step = p.a.k.row_stride * bytes, value_step = p.a.v.row_stride * bytes;
    const char* key = static_cast<const char*>(p.a.k.data) + key_offset - first * key_step;
    const char* value = static_cast<const char*>(p.a.v.data) + value_offset - first * value_step;
    for (int j = from; j < to; ++j) {
      batch.key[j] = key + batch.position[j] * key_step;
      batch.value[j] = value + batch.position[j] * value_step;
    }
  }

  void find_scales(Batch& batch, int from, int to, int64_t first, int64_t page) const {
    const Scales &k = p.k_scales, &v = p.v_scales;
    for (int j = from; j < to; ++j) {
      const int64_t row = batch.position[j] - first;
      batch.key_scale[j] = k.scale + page * k.page_stride + row * k.row_stride;
      batch.value_scale[j] = v.scale + page * v.page_stride + row * v.row_stride;
      batch.key_zero[j] = k.zero ? k.zero + page * k.page_stride + row * k.row_stride : nullptr;
      batch.value_zero[j] = v.zero ? v.zero + page * v.page_stride + row * v.row_stride : nullptr;
    }
  }

  // Whole vectors of keys are scored: those past the last are the first once more, and nobody reads their scores.
  static void pad(Batch& batch) {
    for (int j = batch.count; j % LANES; ++j) {
      batch.key[j] = batch.key[0];
      batch.key_scale[j] = batch.key_scale[0];
      batch.key_zero[j] = batch.key_zero[0];
    }
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
      if (depth % LANES == 0 && p.a.dim == depth * PER) {
        if constexpr (PER == 1)
          widen_row_of(row, p.a.dim, p.a.storage, nullptr, nullptr, 1, p.a.dim, out);
        else
          __builtin_memcpy(out, row, size_t(p.a.dim) * 2);
        continue;
      }
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
    Ahead values_ahead(batch.value, batch.count, row_bytes(p.a.value_dim));
    Ahead keys_ahead(coming.key, coming.count, row_bytes(p.a.dim));
    const int whole = (batch.count + LANES - 1) / LANES * LANES;
    score_tile(batch, whole, values_ahead);
    const bool masked = soften_rows(batch, whole);
    bool poisoned[SLICE];
    bool poison = false;
    if (masked)
      for (int j = 0; j < batch.count; ++j) poison |= poisoned[j] = is_poisoned(batch, j);
    weigh_tile(batch, poison ? poisoned : nullptr, keys_ahead);
    if (poison) add_poison(batch, poisoned);
  }

  // Calls body(rows) with the rows of keys or values in the form in which registers take them.
  template <class Body>
  void narrow(const char* const* rows, const float* const* scale, int64_t dim, const uint8_t* group, const Body& body) const {
    if constexpr (PER == 1) switch (p.kv_storage) {
      case BF16: return body(Narrow<BF16>{rows, scale, dim / 2, group});
      case FP16: return body(Narrow<FP16>{rows, scale, dim / 2, group});
      case INT8: return body(Narrow<INT8>{rows, scale, dim / 2, group});
      case INT4: return body(Narrow<INT4>{rows, scale, dim / 2, group});
    }
  }

  void score_tile(const Batch& batch, int whole, Ahead& ahead) {
    if (narrow_keys)
      return narrow(batch.key, batch.key_scale, p.a.dim, key_group, [&](auto source) { score(source, whole, ahead); });
    const element* key[SLICE];
    const int64_t stride = padded(depth);
    for (int j = 0; j < whole; ++j) {
      if (!key_in_place && j < batch.count) {
        if constexpr (PER == 1)
          widen_row_of(batch.key[j], p.a.dim, p.kv_storage, batch.key_scale[j], batch.key_zero[j], p.k_scales.group, stride,
                       keys + j * stride);
        else
          narrow_codes(batch.key[j], p.a.dim, p.kv_storage, batch.key_scale[j], batch.key_zero[j], p.k_scales.group, 2 * stride,
                       reinterpret_cast<uint16_t*>(keys + j * stride));
      }
      key[j] = key_in_place ? reinterpret_cast<const element*>(batch.key[j]) : keys + (j < batch.count ? j : 0) * stride;
    }
    score(Ready<Op>{key}, whole, ahead);
  }

  template <class Source>
  void score(const Source& key, int whole, Ahead& ahead) {
    const int64_t stride = int64_t(vectors(depth)) * LANES;
    const float scale = plain() ? p.a.scale * LOG2E : p.a.scale;
    int64_t r = 0;
    auto block = [&]<int R>() {
      constexpr int KEYS = LANES / R;
      const Ahead::Pace pace = ahead.pace(whole / KEYS * int64_t(vectors(depth)));
      for (int j = 0; j < whole; j += KEYS)
        dots<Op, R>(key, j, queries + r * stride, depth, scale, scores + r * SLICE + j, r ? nullptr : &ahead, pace);
      r += R;
    };
    while (r + 4 <= u.count) block.template operator()<4>();
    if (r + 2 <= u.count) block.template operator()<2>();
    if (r < u.count) block.template operator()<1>();
  }

  // The sums of weighed values; poisoned ones, if there are any, count as 0.
  void weigh_tile(const Batch& batch, const bool* poisoned, Ahead& ahead) {
    if (narrow_values && !poisoned)
      return narrow(batch.value, batch.value_scale, p.a.value_dim, value_group,
                    [&](auto source) { add_values(source, batch.count, ahead); });
    const element* value[SLICE];
    const int64_t stride = padded(channels);
    if constexpr (PER == 1) {
      const bool ready = in_place(p.a.value_dim, p.kv_storage);
      for (int j = 0; j < batch.count; ++j) {
        if (!ready)
          widen_row_of(batch.value[j], p.a.value_dim, p.kv_storage, batch.value_scale[j], batch.value_zero[j], p.v_scales.group,
                       stride, values + j * stride);
        value[j] = ready ? reinterpret_cast<const float*>(batch.value[j]) : values + j * stride;
        if (poisoned && poisoned[j]) value[j] = zeros;
      }
    } else if (values_in_halves()) {
      for (int j = 0; j < batch.count; ++j)
        value[j] = poisoned && poisoned[j] ? zeros : reinterpret_cast<const element*>(batch.value[j]);
      if (batch.count % 2) value[batch.count] = zeros;
    } else {
      for (int j = 0; j < batch.count; j += 2) {
        bool even = !(poisoned && poisoned[j]), odd = j + 1 < batch.count && !(poisoned && poisoned[j + 1]);
        const int o = odd ? j + 1 : j;
        pair_codes(even ? batch.value[j] : nullptr, odd ? batch.value[o] : nullptr, p.a.value_dim, p.kv_storage,
                   batch.value_scale[j], batch.value_zero[j], batch.value_scale[o], batch.value_zero[o], p.v_scales.group,
                   stride, values + j / 2 * stride);
        value[j / 2] = values + j / 2 * stride;
      }
    }
    add_values(Ready<Op>{value}, (batch.count + PER - 1) / PER, ahead);
  }

  template <class Source>
  void add_values(const Source& value, int count, Ahead& ahead) {
    const int64_t stride = int64_t(vectors(channels)) * LANES;
    int64_t r = 0;
    auto block = [&]<int R>() {
      Ahead* first = r ? nullptr : &ahead;
      if constexpr (PER == 1) {
        weigh_all<Op, R>(value, count, channels, scores + r * SLICE, factor + r, outputs + r * stride, first);
      } else {
        const element* weight = reinterpret_cast<const uint32_t*>(weights + r * SLICE);
        if (values_in_halves())
          weigh_all_halves<R>(value.rows, count, channels, weight, factor + r, outputs + r * stride, first);
        else
          weigh_all<Op, R>(value, count, channels, weight, factor + r, outputs + r * stride, first);
      }
      r += R;
    };
    while (r + 4 <= u.count) block.template operator()<4>();
    if (r + 2 <= u.count) block.template operator()<2>();
    if (r < u.count) block.template operator()<1>();
  }

  // Whether values are paired in registers: no dearer than a tile of pairs as long as few rows need them.
  bool values_in_halves() const {
    return PER == 2 && p.kv_storage == BF16 && p.a.value_dim % (2 * LANES) == 0 && few;
  }

  // Whether scores are the products and nothing else; they are then in units of log 2 already.
  bool plain() const { return p.a.softcap == 0 && !p.a.bias && !p.a.alibi; }

  // Scores of each row become weights; whether some key was hidden from some row.
  bool soften_rows(const Batch& batch, int whole) {
    float change[ROWS + LANES], shift[ROWS];
    bool any = false;
    for (int64_t r = 0; r < u.count; ++r) {
      float* row = scores + r * SLICE;
      if (!plain()) transform(row, r, batch, whole);
      any |= hide(row, r, batch);
      for (int j = batch.count; j < whole; ++j) row[j] = -INF;
      vf most = splat(-INF);
      for (int j = 0; j < whole; j += LANES) most = load(row + j) > most ? load(row + j) : most;
      float high = highest_lane(most);
      high = high > top[r] ? high : top[r];
      shift[r] = high == -INF ? 0.0f : high;
      change[r] = top[r] - shift[r];
      top[r] = high;
    }
    for (int64_t r = 0; r < u.count; ++r) {
      float* row = scores + r * SLICE;
      vf total = {};
      for (int j = 0; j < whole; j += LANES) {
        vf weight = exp2v(load(row + j) - shift[r]);
        total += weight;
        if constexpr (PER == 1)
          store(row + j, weight);
        else
          *reinterpret_cast<vh_any*>(weights + r * SLICE + j) = narrow_bf16(weight);
      }
      if (r % LANES == 0) store(change + r, exp2v(load(change + r)));
      factor[r] = change[r];
      sum[r] = sum[r] * factor[r] + sum_of_lanes(total);
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

// Codes are exact in fp32, and paired only where many queries repay it.
INLINE bool works_in_pairs(const Decode& p) {
  if (!HAS_BF16_DOT || p.a.storage != BF16) return false;
  if (p.kv_storage == INT8 || p.kv_storage == INT4) return p.a.heads / p.list_heads * p.list_group > FEW_ROWS;
  return p.kv_storage == BF16;
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
