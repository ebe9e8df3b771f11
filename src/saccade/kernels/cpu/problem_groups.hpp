// Attention of few queries over tokens packed in groups, as Python hands it over.
#pragma once
#include "problem.hpp"

namespace saccade {

// What each group has of one kind, `stride` bytes apart.
struct GroupPart {
  const char* data;
  int64_t stride;
};

// Group n of (b, g) is number table[b, g, n] of each part and holds `size` tokens, all of them seen by every query. A number is
// low + scale * code; scale and low are of each channel of a group's keys [D], and of each `channels` of a token's value
// [size, E / channels], which is then multiplied by the channel's norm [E] if there are norms.
// Codes of a group are one row [size * dim], of which byte i holds codes i, i + n, i + 2 n, .., lowest bits first, n its bytes.
struct Groups {
  int64_t batch, heads, kv_heads, queries, dim, value_dim;
  int32_t storage, scale_storage, bits, threads;  // storage is that of q
  Rows q;
  float *out, *lse;      // [cuts, B, H, M, E] and [cuts, B, H, M], natural logarithm: of each cut of the groups
  float scale, softcap;  // softcap 0: none
  int64_t size, channels, cuts, stretch;  // a cut has `stretch` groups, the last what is left
  GroupPart key, key_scale, key_low, value, value_scale, value_low, value_norm;  // value_norm may be null
  const int64_t* table;
  int64_t table_stride[2];
  const int64_t* lengths;  // [B, G], groups of each
};

}  // namespace saccade
