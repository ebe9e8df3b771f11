// Which keys a unit of work sees and where their rows lie: contiguous, in pages, or listed.
#pragma once
#include "problem_decode.hpp"
#include "simd.hpp"

namespace saccade::SACCADE_ISA {

constexpr int SLICE = 128;  // keys of a tile, at most

// Bytes of a row of `dim` channels.
INLINE int64_t row_bytes(int64_t dim, int32_t storage) {
  switch (storage) {
    case FP32: return dim * 4;
    case INT8: return dim;
    case INT4: return dim / 2;
    default: return dim * 2;
  }
}

// The keys and values of a tile.
struct Batch {
  int count;
  int64_t position[SLICE];
  const char *key[SLICE], *value[SLICE];
  const float *key_scale[SLICE], *key_zero[SLICE], *value_scale[SLICE], *value_zero[SLICE];
};

// The keys of a unit, tile after tile.
class Walk {
 public:
  // The first tile is that of the first key that some row sees.
  Walk(const Decode& problem, const Part& part, int64_t tile_keys) : p(problem), u(part), slots(tile_keys) {
    head = u.t * (p.a.heads / p.list_heads);
    g = head / (p.a.heads / p.a.kv_heads);
    members = p.a.queries - u.n * p.list_group;
    if (members > p.list_group) members = p.list_group;
    tokens = p.lengths ? p.lengths[u.b * p.a.kv_heads + g] : p.a.keys;
    slot = u.start;
    end = u.end;
    if (p.lists) return;
    int64_t low = tokens, high = 0;
    for (int64_t r = 0; r < u.count; ++r) {
      if (lowest(r) < low) low = lowest(r);
      if (highest(r) + 1 > high) high = highest(r) + 1;
    }
    slot = slot > low ? slot : low;
    end = end < high ? end : high;
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

  // The next keys; none when all have been there.
  void next(Batch& batch) {
    int count = 0;
    if (p.lists) {
      const int64_t* list = p.lists + u.b * p.list_stride[0] + u.t * p.list_stride[1] + u.n * p.list_stride[2];
      for (; slot < end && count < slots; ++slot)
        if (list[slot] >= 0) batch.position[count++] = list[slot];
    } else {
      count = int(end - slot < slots ? end - slot : slots);
      count = count < 0 ? 0 : count;
      for (int j = 0; j < count; ++j) batch.position[j] = slot + j;
      slot += count;
    }
    batch.count = count;
    const int64_t bytes = p.kv_storage == FP32 ? 4 : p.kv_storage == INT8 || p.kv_storage == INT4 ? 1 : 2;
    if (!p.table) {
      find(batch, 0, count, 0, (u.b * p.a.k.batch_stride + g * p.a.k.head_stride) * bytes,
           (u.b * p.a.v.batch_stride + g * p.a.v.head_stride) * bytes, bytes);
    } else {
      const int64_t* table = p.table + u.b * p.table_stride[0] + g * p.table_stride[1];
      const int64_t* keys = p.key_table ? p.key_table + u.b * p.key_table_stride[0] + g * p.key_table_stride[1] : table;
      for (int from = 0, to; from < count; from = to) {  // the keys of one page
        const int64_t entry = batch.position[from] / p.page_size, first = entry * p.page_size;
        const int64_t key_page = keys[entry], page = table[entry];
        to = from + 1;
        if (p.lists)
          while (to < count && batch.position[to] >= first && batch.position[to] < first + p.page_size) ++to;
        else
          to = int(first + p.page_size - batch.position[from] < count - from ? from + first + p.page_size - batch.position[from] : count);
        find(batch, from, to, first, key_page * p.a.k.batch_stride * bytes, page * p.a.v.batch_stride * bytes, bytes);
        if (p.k_scales.scale) find_scales(batch, from, to, first, key_page, page);
      }
    }
    pad(batch);
  }

 protected:
  const Decode& p;
  const Part& u;
  const int64_t slots;  // keys of a tile
  int64_t head, g, members, tokens;

 private:
  int64_t slot, end;  // of the keys to come

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

  void find_scales(Batch& batch, int from, int to, int64_t first, int64_t key_page, int64_t page) const {
    const Scales &k = p.k_scales, &v = p.v_scales;
    for (int j = from; j < to; ++j) {
      const int64_t row = batch.position[j] - first;
      batch.key_scale[j] = k.scale + key_page * k.page_stride + row * k.row_stride;
      batch.value_scale[j] = v.scale + page * v.page_stride + row * v.row_stride;
      batch.key_zero[j] = k.zero ? k.zero + key_page * k.page_stride + row * k.row_stride : nullptr;
      batch.value_zero[j] = v.zero ? v.zero + page * v.page_stride + row * v.row_stride : nullptr;
    }
  }

  // Whole vectors of keys are scored: those past the last are the first once more, and nobody reads their scores; their
  // values have no weight.
  static void pad(Batch& batch) {
    for (int j = batch.count; j % LANES; ++j) {
      batch.key[j] = batch.key[0];
      batch.value[j] = batch.value[0];
      batch.key_scale[j] = batch.key_scale[0];
      batch.key_zero[j] = batch.key_zero[0];
    }
  }
};

}  // namespace saccade::SACCADE_ISA
