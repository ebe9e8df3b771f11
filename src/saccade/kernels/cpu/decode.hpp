// Attention of few queries, bound by memory: each key and value is read once, for all the queries that share it.
//
// Vectors lie along the head dim, so that rows of any layout are read in place, and widened in registers where they are
// stored in fewer bits (or in a tile that stays in cache, where many queries share them). A register block is a few rows
// of queries by a few keys; its sums across lanes are taken for a whole vector of (query, key) pairs at once. Softmax goes
// along the keys.
#pragma once
#include "attend.hpp"
#include "decode_codes.hpp"
#include "decode_products.hpp"

namespace saccade::SACCADE_ISA {

constexpr int ROWS = 64;     // queries of a unit, at most
constexpr int FEW_ROWS = 8;  // so many queries do not repay a tile of widened keys and values
constexpr int64_t REACH = 32768;  // bytes of the keys of a tile: they and as many values wait in the second cache, see Ahead

template <class Op>
class Stream : Walk {
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
  // Whether codes are multiplied as bytes, for so many rows.
  static bool as_bytes(int64_t dim, int32_t storage, const Scales& scales, int64_t rows) {
    return PER == 1 && rows <= CODE_ROWS && fits_bytes(dim, storage, scales);
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
                     take(SLICE * padded(values)), take(padded(values)), take(rows),
                     take(HAS_BYTE_DOT && p.k_scales.scale ? int64_t(sizeof(CodeScratch)) / 4 : 0)};
    if (self) {
      self->queries = reinterpret_cast<element*>(parts[0]);
      self->scores = reinterpret_cast<float*>(parts[1]);
      self->weights = reinterpret_cast<uint16_t*>(parts[2]);
      self->keys = reinterpret_cast<element*>(parts[3]);
      self->values = reinterpret_cast<element*>(parts[4]);
      self->zeros = reinterpret_cast<element*>(parts[5]);
      self->factor = reinterpret_cast<float*>(parts[6]);
      self->codes = reinterpret_cast<CodeScratch*>(parts[7]);
    }
    return used;
  }

  static bool is_few(const Part& part) { return part.count <= FEW_ROWS; }
  // Keys of a tile: as many as REACH takes where they are read in place.
  static int64_t tile_keys(const Decode& p, const Part& part) {
    const bool few = is_few(part);
    if (as_bytes(p.a.dim, p.kv_storage, p.k_scales, part.count)) return SLICE;
    if (!in_place(p.a.dim, p.kv_storage) && !(few && in_registers(p.a.dim, p.kv_storage, p.k_scales))) return SLICE / 2;
    const int64_t keys = REACH / row_bytes(p.a.dim, p.kv_storage) / LANES * LANES, most = few ? SLICE : SLICE / 2;
    return keys < 16 ? 16 : keys > most ? most : keys;
  }

  Stream(const Decode& problem, const Part& part, char* memory, float* partial)
      : Walk(problem, part, tile_keys(problem, part)), depth(key_depth(problem)), channels(value_depth(problem)) {
    lay_out(p, u.count, memory, this);
    few = is_few(u);
    key_in_place = in_place(p.a.dim, p.kv_storage);
    narrow_keys = few && in_registers(p.a.dim, p.kv_storage, p.k_scales);
    narrow_values = few && in_registers(p.a.value_dim, p.kv_storage, p.v_scales);
    byte_keys = as_bytes(p.a.dim, p.kv_storage, p.k_scales, u.count);
    byte_values = as_bytes(p.a.value_dim, p.kv_storage, p.v_scales, u.count);
    if (narrow_keys) number_groups(p.a.dim, p.k_scales.group, key_group);
    if (narrow_values) number_groups(p.a.value_dim, p.v_scales.group, value_group);
    outputs = partial;
    top = partial + u.count * padded(p.a.value_dim);
    sum = top + u.count;
  }

  // While the last keys are worked on, memory brings the first ones of the unit that this thread does next, if there is one.
  void run(const Part* following) {
    for (int64_t r = 0; r < u.count; ++r) {
      top[r] = -INF;
      sum[r] = 0;
    }
    for (int64_t i = 0; i < u.count * vectors(channels) * LANES; ++i) outputs[i] = 0;
    for (int64_t e = 0; e < padded(channels); ++e) zeros[e] = 0;
    Batch batches[2];
    next(batches[0]);
    if (batches[0].count) pack_queries();
    if constexpr (PER == 1)
      for (int64_t r = 0; byte_keys && r < u.count; ++r)
        byte_keys = split_query(queries + r * depth, p.a.dim, code_offset(), int(r), *codes);
    for (int now = 0; batches[now].count; now = !now) {
      next(batches[!now]);
      const bool last = batches[!now].count == 0;
      if (last && following) Walk(p, *following, tile_keys(p, *following)).next(batches[!now]);
      tile(batches[now], batches[!now]);
      if (last) break;
    }
  }

 private:
  const int64_t depth, channels;  // elements of a key and of a value as the products see them
  element *queries, *keys, *values, *zeros;
  float *scores, *factor, *outputs, *top, *sum;
  uint16_t* weights;
  bool few, key_in_place, narrow_keys, narrow_values, byte_keys, byte_values;
  CodeScratch* codes;
  uint8_t key_group[MOST_VECTORS], value_group[MOST_VECTORS];

  int code_offset() const { return p.kv_storage == INT8 ? 128 : 8; }  // of keys as bytes without sign

  // How often rows are asked for while scores are taken, and while values are weighed.
  int64_t score_steps(int whole) const {
    if (byte_keys) return row_blocks() * (whole / LANES) * (p.a.dim / CODE_SPAN) * (LANES / 4);
    return vectors(depth) * u.count * whole / LANES;
  }
  int64_t weigh_steps(int count) const {
    if (byte_values) return row_blocks() * ((count + 3) / 4) * (p.a.value_dim / CODE_SPAN) * 2;
    return vectors(channels) / most_vectors(4) * (u.count / 4) * ((count + PER - 1) / PER);
  }
  int64_t row_blocks() const { return u.count / 4 + (u.count >> 1 & 1) + (u.count & 1); }

  // Scales lie apart from the codes, several rows' in a line.
  void ask_for_scales(const Batch& batch) const {
    auto ask = [&](const Scales& x, const float* const* scale, const float* const* zero) {
      const int step = p.lists || x.row_stride < 1 || x.row_stride > 8 ? 1 : int(16 / x.row_stride);
      for (int j = 0; j < batch.count; j += step) {
        __builtin_prefetch(scale[j]);
        if (x.zero) __builtin_prefetch(zero[j]);
      }
    };
    ask(p.k_scales, batch.key_scale, batch.key_zero);
    ask(p.v_scales, batch.value_scale, batch.value_zero);
  }

  // body<STORAGE>()
  template <class Body>
  void with_codes(const Body& body) const {
    if (p.kv_storage == INT8)
      body.template operator()<INT8>();
    else
      body.template operator()<INT4>();
  }

  // body<R>(r) for blocks of R rows from r on.
  template <class Body>
  void by_rows(const Body& body) const {
    int64_t r = 0;
    for (; r + 4 <= u.count; r += 4) body.template operator()<4>(r);
    if (r + 2 <= u.count) {
      body.template operator()<2>(r);
      r += 2;
    }
    if (r < u.count) body.template operator()<1>(r);
  }

  void number_groups(int64_t dim, int64_t group, uint8_t* numbers) const {
    if (p.kv_storage != INT8 && p.kv_storage != INT4) return;
    for (int64_t d = 0; d < dim; d += LANES) numbers[d / LANES] = uint8_t(d / group);
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
    const int whole = (batch.count + LANES - 1) / LANES * LANES;
    Ahead values_ahead(batch.value, batch.count, row_bytes(p.a.value_dim, p.kv_storage), score_steps(whole));
    Ahead keys_ahead(coming.key, coming.count, row_bytes(p.a.dim, p.kv_storage), weigh_steps(batch.count));
    if (p.k_scales.scale) ask_for_scales(coming);
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
    if (byte_keys) {
      const bool zero = p.k_scales.zero != nullptr;
      turn_scales(batch.key_scale, batch.key_zero, zero, batch.count, p.a.dim / p.k_scales.group, *codes);
      return by_rows([&]<int R>(int64_t r) {
        with_codes([&]<int32_t STORAGE>() {
          code_dots<STORAGE, R>(batch.key, whole, p.a.dim, p.k_scales.group, zero, score_factor(), int(r), *codes,
                                scores + r * SLICE, ahead);
        });
      });
    }
    if (narrow_keys)
      return narrow(batch.key, batch.key_scale, p.a.dim, key_group, [&](auto source) { score(source, whole, ahead); });
    if (key_in_place) return score(Ready<Op>{reinterpret_cast<const element* const*>(batch.key)}, whole, ahead);
    const element* key[SLICE];
    const int64_t stride = padded(depth);
    for (int j = 0; j < whole; ++j) {
      if (j < batch.count) {
        if constexpr (PER == 1)
          widen_row_of(batch.key[j], p.a.dim, p.kv_storage, batch.key_scale[j], batch.key_zero[j], p.k_scales.group, stride,
                       keys + j * stride);
        else
          narrow_codes(batch.key[j], p.a.dim, p.kv_storage, batch.key_scale[j], batch.key_zero[j], p.k_scales.group, 2 * stride,
                       reinterpret_cast<uint16_t*>(keys + j * stride));
      }
      key[j] = keys + (j < batch.count ? j : 0) * stride;
    }
    score(Ready<Op>{key}, whole, ahead);
  }

  template <class Source>
  void score(const Source& key, int whole, Ahead& ahead) {
    const int64_t stride = int64_t(vectors(depth)) * LANES;
    const float scale = score_factor();
    by_rows([&]<int R>(int64_t r) {
      constexpr int KEYS = LANES / R;
      for (int j = 0; j < whole; j += KEYS)
        dots<Op, R>(key, j, queries + r * stride, depth, scale, scores + r * SLICE + j, ahead);
    });
  }

  // The sums of weighed values; poisoned ones, if there are any, count as 0.
  void weigh_tile(const Batch& batch, const bool* poisoned, Ahead& ahead) {
    if (byte_values && !poisoned && weigh_bytes(batch, ahead)) return;
    if (narrow_values && !poisoned)
      return narrow(batch.value, batch.value_scale, p.a.value_dim, value_group,
                    [&](auto source) { add_values(source, batch.count, ahead); });
    const bool ready = PER == 1 ? in_place(p.a.value_dim, p.kv_storage) : values_in_halves() && batch.count % 2 == 0;
    if (ready && !poisoned)
      return add_values(Ready<Op>{reinterpret_cast<const element* const*>(batch.value)}, batch.count / PER, ahead);
    const element* value[SLICE];
    const int64_t stride = padded(channels);
    if constexpr (PER == 1) {
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

  // False, with nothing done, where scales are not those of numbers.
  bool weigh_bytes(const Batch& batch, Ahead& ahead) {
    const bool zero = p.v_scales.zero != nullptr;
    const int64_t dim = p.a.value_dim, groups = dim / p.v_scales.group;
    const int whole = (batch.count + LANES - 1) / LANES * LANES;
    if (!turn_scales(batch.value_scale, batch.value_zero, zero, batch.count, groups, *codes)) return false;
    for (int64_t r = 0; r < u.count; ++r) {
      split_weights(scores + r * SLICE, whole, groups, p.kv_storage == INT8 ? 0 : 8, zero, int(r), *codes);
      for (int64_t e = 0; e < dim; e += LANES) store(outputs + r * dim + e, load(outputs + r * dim + e) * factor[r]);
    }
    by_rows([&]<int R>(int64_t r) {
      with_codes([&]<int32_t STORAGE>() {
        code_values<STORAGE, R>(batch.value, (batch.count + 3) / 4 * 4, dim, p.v_scales.group, int(r), *codes, outputs + r * dim,
                                dim, ahead);
      });
    });
    return true;
  }

  template <class Source>
  void add_values(const Source& value, int count, Ahead& ahead) {
    const int64_t stride = int64_t(vectors(channels)) * LANES;
    by_rows([&]<int R>(int64_t r) {
      if constexpr (PER == 1) {
        weigh_all<Op, R>(value, count, channels, scores + r * SLICE, factor + r, outputs + r * stride, ahead);
      } else {
        const element* weight = reinterpret_cast<const uint32_t*>(weights + r * SLICE);
        if (values_in_halves())
          weigh_all_halves<R>(value.rows, count, channels, weight, factor + r, outputs + r * stride, ahead);
        else
          weigh_all<Op, R>(value, count, channels, weight, factor + r, outputs + r * stride, ahead);
      }
    });
  }

  // Whether values are paired in registers: no dearer than a tile of pairs as long as few rows need them.
  bool values_in_halves() const {
    return PER == 2 && p.kv_storage == BF16 && p.a.value_dim % (2 * LANES) == 0 && few;
  }

  float score_factor() const { return plain() ? p.a.scale * LOG2E : p.a.scale; }
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
