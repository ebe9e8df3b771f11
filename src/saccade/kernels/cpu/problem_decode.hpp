// Attention of few queries over a stored cache or over lists of keys, as Python hands it over.
#pragma once
#include "problem.hpp"

namespace saccade {

// How keys or values lie beyond `Storage`: codes with scales, value = (code - zero) * scale.
// INT8 is signed. INT4 has byte i of a row hold channel i in its low and channel i + dim / 2 in its high four bits, each
// plus 8.
enum Codes : int32_t { INT8 = 3, INT4 = 4 };

// Scales [.., rows, dim / group], by the pages or (batch, head) of the codes; innermost axis contiguous.
struct Scales {
  const float *scale, *zero;  // zero may be null
  int64_t page_stride, row_stride, group;
};

struct Decode {
  Attention a;  // k, v: with a table batch_stride is that of the pages; storage is that of q
  int32_t kv_storage, reserved;
  Scales k_scales, v_scales;
  // Row j of (b, g) is row j % page_size of page table[b, g, j / page_size]; null: rows of a.k and a.v themselves.
  const int64_t* table;
  int64_t table_stride[2], page_size;
  const int64_t* lengths;  // [B, G], keys of each; null: a.keys
  // Queries n * list_group .. of (b, t) attend to the keys lists[b, t, n, 0 .. list_length - 1], -1 being an empty slot;
  // null: to all. t counts the heads of the lists: `list_heads` is G, or H for lists of each query head's own.
  const int64_t* lists;
  int64_t list_stride[3], list_heads, list_length, list_group;
  // Pages of the keys, with their scales, where they are not those of the values: heads may share some. Null: `table`.
  const int64_t* key_table;
  int64_t key_table_stride[2];
};

// What a unit of work is: rows `first` .. of the queries that share keys, and the slots (keys or places in the list)
// start .. end - 1. Row r is query r % members of head r / members.
struct Part {
  int64_t b, t, n, first, count, start, end;
};

}  // namespace saccade
