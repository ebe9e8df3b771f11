// Attention of few queries over tokens packed in groups whose key channels have a scale of their own.
//
// In a group q . k = q . low + sum over c of (q_c scale_c) code_c: scales fold into the queries once for all its tokens, and
// into the weights for values, so that codes are only turned into floats, a vector at a time, and never stored as such.
#pragma once
#include "codes.hpp"
#include "decode_products.hpp"
#include "problem_groups.hpp"

namespace saccade::SACCADE_ISA {

typedef uint8_t v_codes __attribute__((vector_size(SACCADE_LANES), aligned(1), may_alias));

// LANES codes as floats.
INLINE vf code_floats(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const v_codes*>(p), vi), vf);
#endif
}

// One code a byte of `bytes` bytes of codes; `out` has room for all.
template <int BITS>
static void spread_codes(const uint8_t* packed, int64_t bytes, uint8_t* out) {
  for (int part = 0; part < 8 / BITS; ++part)
    for (int64_t i = 0; i < bytes; ++i) out[part * bytes + i] = uint8_t(packed[i] >> part * BITS) & ((1 << BITS) - 1);
}

// Codes [size * dim] of a group, as they lie or spread into `room`.
static const uint8_t* codes_of(const char* packed, int64_t count, int32_t bits, uint8_t* room) {
  const uint8_t* p = reinterpret_cast<const uint8_t*>(packed);
  if (bits == 8) return p;
  bits == 4 ? spread_codes<4>(p, count / 2, room) : spread_codes<2>(p, count / 4, room);
  return room;
}

// A row as floats.
static void floats_of(const char* row, int64_t dim, int32_t storage, float* out) {
  if (storage == FP32)
    __builtin_memcpy(out, row, size_t(dim) * 4);
  else
    widen_row(row, dim, storage, out);
}

// The queries that share a head's groups. Dims are multiples of the lanes, and so are the channels that share a scale.
class GroupStream {
 public:
  static constexpr int BLOCK = LANES < 4 ? LANES : 4;  // rows of a register block, where there is more than one

  GroupStream(const Groups& problem, char* memory, int64_t* bytes = nullptr) : p(problem) {
    rows = p.heads / p.kv_heads * p.queries;
    block = rows == 1 ? 1 : BLOCK;
    padded = round_up(rows, block);
    width = round_up(p.size, LANES);
    shares = p.value_dim / p.channels;
    int64_t taken = 0;
    auto part = [&](int64_t size) {
      char* at = memory + taken;
      taken += round_up(size, 64);
      return at;
    };
    auto floats = [&](int64_t count) { return reinterpret_cast<float*>(part(count * 4)); };
    queries = floats(padded * p.dim);
    folded = floats(padded * p.dim);
    scores = floats(padded * width);
    total = floats(padded * p.value_dim);
    most = floats(padded);
    sum = floats(padded);
    bias = floats(padded);
    factor = floats(padded);
    key_scale = floats(p.dim);
    key_low = floats(p.dim);
    value_scale = floats(shares * width);
    value_low = floats(shares * width);
    as_stored = floats(p.size * shares);
    norm = floats(p.value_dim);
    weight = floats(BLOCK * shares * width);
    shift = floats(BLOCK * shares);
    room = reinterpret_cast<uint8_t*>(part(p.size * (p.dim > p.value_dim ? p.dim : p.value_dim)));
    if (bytes) *bytes = taken;
  }

  // Groups start .. end - 1 of a head.
  void run(int64_t b, int64_t g, int64_t start, int64_t end, int64_t cut) {
    take_queries(b, g);
    const int64_t length = p.lengths[b * p.kv_heads + g];
    for (int64_t n = start; n < end && n < length; ++n) {
      const int64_t group = p.table[b * p.table_stride[0] + g * p.table_stride[1] + n];
      score(group);
      for (int64_t r = 0; r < padded; ++r) soften(r);
      weigh_values(group);
    }
    write(b, g, cut);
  }

 private:
  const Groups& p;
  int64_t rows, block, padded, width, shares;  // width: places of a group's tokens; shares: scales of a value
  float *queries, *folded, *scores, *total, *most, *sum, *bias, *factor;
  float *key_scale, *key_low, *value_scale, *value_low, *as_stored, *norm, *weight, *shift;
  uint8_t* room;

  const char* at(const GroupPart& part, int64_t group) const { return part.data + group * part.stride; }

  void take_queries(int64_t b, int64_t g) {
    const float scale = p.softcap > 0 ? p.scale : p.scale * LOG2E;
    for (int64_t r = 0; r < padded; ++r) {
      float* into = queries + r * p.dim;
      if (r < rows)
        floats_of(row_of(p.q, b, g * (p.heads / p.kv_heads) + r / p.queries, r % p.queries, p.storage), p.dim, p.storage, into);
      for (int64_t d = 0; d < p.dim; ++d) into[d] = r < rows ? into[d] * scale : 0.0f;
      for (int64_t e = 0; e < p.value_dim; ++e) total[r * p.value_dim + e] = 0;
      most[r] = -INF;
      sum[r] = 0;
    }
  }

  // scores[r][j] = log2(e) * score, -inf beyond the group.
  void score(int64_t group) {
    floats_of(at(p.key_scale, group), p.dim, p.scale_storage, key_scale);
    floats_of(at(p.key_low, group), p.dim, p.scale_storage, key_low);
    for (int64_t r = 0; r < padded; ++r) {
      vf low = {};
      for (int64_t d = 0; d < p.dim; d += LANES) {
        const vf x = load(queries + r * p.dim + d);
        store(folded + r * p.dim + d, x * load(key_scale + d));
        low += x * load(key_low + d);
      }
      bias[r] = sum_of_lanes(low);
    }
    const uint8_t* codes = codes_of(at(p.key, group), p.size * p.dim, p.bits, room);
    for (int64_t r = 0; r < padded; r += block) block == 1 ? score_block<1>(codes, r) : score_block<BLOCK>(codes, r);
  }

  template <int R>
  void score_block(const uint8_t* codes, int64_t r) {
    constexpr int KEYS = LANES / R;
    for (int64_t j = 0; j < p.size; j += KEYS) {
      const uint8_t* key[KEYS];
      for (int i = 0; i < KEYS; ++i) key[i] = codes + (j + i < p.size ? j + i : p.size - 1) * p.dim;
      vf acc[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) acc[i] = vf{};
      for (int64_t d = 0; d < p.dim; d += LANES) {
        vf x[KEYS];
#pragma GCC unroll 16
        for (int i = 0; i < KEYS; ++i) x[i] = code_floats(key[i] + d);
#pragma GCC unroll 4
        for (int n = 0; n < R; ++n) {
          const vf y = load(folded + (r + n) * p.dim + d);
#pragma GCC unroll 16
          for (int i = 0; i < KEYS; ++i) acc[n * KEYS + i] += x[i] * y;
        }
      }
      float sums[LANES];
      store(sums, sums_of(acc));
      for (int n = 0; n < R; ++n)
        for (int i = 0; i < KEYS; ++i) scores[(r + n) * width + j + i] = sums[n * KEYS + i] + bias[r + n];
    }
    for (int n = 0; n < R; ++n)
      for (int64_t j = p.size; j < width; ++j) scores[(r + n) * width + j] = -INF;
  }

  // Scores of a row become weights relative to the greatest so far; `factor` is what that makes of what was summed before.
  void soften(int64_t r) {
    float* row = scores + r * width;
    vf high = splat(-INF), added = {};
    for (int64_t j = 0; j < width; j += LANES) {
      vf x = load(row + j);
      if (p.softcap > 0) {
        x = j + LANES <= p.size ? x : only(x, p.size - j, 0.0f);
        x = only(capped(x, p.softcap) * LOG2E, p.size - j, -INF);
        store(row + j, x);
      }
      high = x > high ? x : high;
    }
    const float highest = highest_lane(high), now = highest > most[r] ? highest : most[r], base = now == -INF ? 0.0f : now;
    factor[r] = exp2v(splat(most[r] - base))[0];
    for (int64_t j = 0; j < width; j += LANES) {
      const vf w = exp2v(load(row + j) - base);
      store(row + j, w);
      added += w;
    }
    sum[r] = sum[r] * factor[r] + sum_of_lanes(added);
    most[r] = now;
  }

  // x in the first `count` lanes, `other` in the rest.
  static vf only(vf x, int64_t count, float other) {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane < splat(int32_t(count > LANES ? LANES : count)) ? x : splat(other);
  }

  void weigh_values(int64_t group) {
    turn(at(p.value_scale, group), value_scale);
    turn(at(p.value_low, group), value_low);
    if (p.value_norm.data) floats_of(at(p.value_norm, group), p.value_dim, p.scale_storage, norm);
    const uint8_t* codes = codes_of(at(p.value, group), p.size * p.value_dim, p.bits, room);
    for (int64_t r = 0; r < padded; r += block) block == 1 ? weigh_block<1>(codes, r) : weigh_block<BLOCK>(codes, r);
  }

  // Scales [size, shares] as [shares][width] floats, zeros beyond the group.
  void turn(const char* stored, float* out) {
    floats_of(stored, p.size * shares, p.scale_storage, as_stored);
    for (int64_t n = 0; n < shares; ++n)
      for (int64_t j = 0; j < width; ++j) out[n * width + j] = j < p.size ? as_stored[j * shares + n] : 0.0f;
  }

  template <int R>
  void weigh_block(const uint8_t* codes, int64_t r) {
    for (int64_t n = 0; n < shares; ++n)
      for (int i = 0; i < R; ++i) {
        vf low = {};
        for (int64_t j = 0; j < width; j += LANES) {
          const vf w = load(scores + (r + i) * width + j);
          store(weight + (n * R + i) * width + j, w * load(value_scale + n * width + j));
          low += w * load(value_low + n * width + j);
        }
        shift[n * R + i] = sum_of_lanes(low);
      }
    int64_t e = 0;
    for (; e + 4 * LANES <= p.value_dim; e += 4 * LANES) weigh_channels<R, 4>(codes, r, e);
    for (; e < p.value_dim; e += LANES) weigh_channels<R, 1>(codes, r, e);
  }

  // Adds a group's values to V vectors of channels from `e` on, for R rows.
  template <int R, int V>
  __attribute__((always_inline)) void weigh_channels(const uint8_t* codes, int64_t r, int64_t e) {
    const float* weights[V];
    vf acc[R][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      weights[v] = weight + (e + v * LANES) / p.channels * R * width;
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) acc[i][v] = vf{};
    }
    for (int64_t j = 0; j < p.size; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const vf x = code_floats(codes + j * p.value_dim + e + v * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) acc[i][v] += x * weights[v][i * width + j];
      }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t channel = e + v * LANES;
      const vf times = p.value_norm.data ? load(norm + channel) : splat(1.0f);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        float* into = total + (r + i) * p.value_dim + channel;
        store(into, load(into) * factor[r + i] + (acc[i][v] + shift[channel / p.channels * R + i]) * times);
      }
    }
  }

  void write(int64_t b, int64_t g, int64_t cut) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = g * (p.heads / p.kv_heads) + r / p.queries;
      const int64_t row = ((cut * p.batch + b) * p.heads + head) * p.queries + r % p.queries;
      const bool empty = sum[r] == 0;
      for (int64_t e = 0; e < p.value_dim; e += LANES)
        store(p.out + row * p.value_dim + e, empty ? vf{} : load(total + r * p.value_dim + e) / sum[r]);
      p.lse[row] = empty ? -INF : most[r] * LN2 + logv(splat(sum[r]))[0];
    }
  }
};

static int64_t group_scratch(const Groups& p) {
  int64_t bytes;
  GroupStream(p, nullptr, &bytes);
  return bytes;
}

static void attend_groups(const Groups& p, char* memory, int64_t b, int64_t g, int64_t start, int64_t end, int64_t cut) {
  GroupStream(p, memory).run(b, g, start, end, cut);
}

}  // namespace saccade::SACCADE_ISA
