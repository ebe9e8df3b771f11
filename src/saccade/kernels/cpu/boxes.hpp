// Attention within boxes of a grid: a tile of neighbouring tokens lies across the lanes of one vector, and the rows of the
// other side that any of them sees, the union of their boxes, are read in place. Compact tiles keep that union small: for
// a 7 x 7 window and tiles of 4 x 4 it is 10 x 10. (A panel of two vectors would share each element it reads between two
// products, but its 10 x 14 rows are 40% more work.)
#pragma once
#include "problem_boxes.hpp"
#include "rows.hpp"
#include "scores.hpp"
#include "tile.hpp"

namespace saccade::SACCADE_ISA {

constexpr int LIST = 128;                     // rows that are worked on at a time
constexpr int NARROW = LANES == 16 ? 16 : 8;  // accumulators of one vector that fit the registers, a divisor of LIST

// out[row][lane] = sum over d of rows[row][d] * columns[d][lane]
template <int R>
INLINE void narrow_product(const float* const* rows, const float* columns, int depth, float* out) {
  vf acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = vf{};
  int d = 0;
  for (; d + 4 <= depth; d += 4, columns += 4 * LANES) {  // a row's address serves four products
    vf c0 = load(columns), c1 = load(columns + LANES), c2 = load(columns + 2 * LANES), c3 = load(columns + 3 * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float* row = rows[r] + d;
      acc[r] += row[0] * c0;
      acc[r] += row[1] * c1;
      acc[r] += row[2] * c2;
      acc[r] += row[3] * c3;
    }
  }
  for (; d < depth; ++d, columns += LANES)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r] += rows[r][d] * load(columns);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(out + r * LANES, acc[r]);
}

// out[channel][lane] = out[channel][lane] * factor[lane] + sum over rows of rows[row][channel] * weights[row][lane]
template <int R>
INLINE void narrow_channels(const float* const* rows, int count, int channel, const float* weights, vf factor, float* out) {
  vf acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = load(out + r * LANES) * factor;
  for (int j = 0; j < count; ++j, weights += LANES) {
    const float* row = rows[j] + channel;
    vf weight = load(weights);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r] += row[r] * weight;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(out + r * LANES, acc[r]);
}

static void narrow_accumulate(const float* const* rows, int count, int channels, const float* weights, vf factor, float* out) {
  int e = 0;
  for (; e + NARROW <= channels; e += NARROW) narrow_channels<NARROW>(rows, count, e, weights, factor, out + e * LANES);
  for (; e + 4 <= channels; e += 4) narrow_channels<4>(rows, count, e, weights, factor, out + e * LANES);
  for (; e < channels; ++e) narrow_channels<1>(rows, count, e, weights, factor, out + e * LANES);
}

struct BoxScratch {
  float *mine, *mine_too;    // [dim or value_dim][LANES]: q and grad_out of queries, or k and v of keys
  float *total, *total_too;  // [dim or value_dim][LANES], what is summed
  float *scores, *slopes;    // [LIST][LANES]
  float *rows, *rows_too;    // [LIST][dim], [LIST][value_dim], converted
  float* zeros;              // [dim or value_dim]
  uint32_t* marks[3];        // per axis: which lanes see a coordinate
};

// Bytes of a thread's scratch; with `memory` also lays it out there (64-byte aligned).
static int64_t lay_out(const Boxes& p, BoxScratch* scratch, char* memory) {
  int64_t used = 0, widest = (p.dim > p.value_dim ? p.dim : p.value_dim);
  auto take = [&](int64_t floats) {
    char* place = memory + used;
    used += (floats * 4 + 63) / 64 * 64;
    return reinterpret_cast<float*>(place);
  };
  BoxScratch s;
  s.mine = take(widest * LANES);
  s.mine_too = take(widest * LANES);
  s.total = take(widest * LANES);
  s.total_too = take(widest * LANES);
  s.scores = take(LIST * LANES);
  s.slopes = take(LIST * LANES);
  s.rows = take(p.storage == FP32 ? 0 : LIST * p.dim);
  s.rows_too = take(p.storage == FP32 ? 0 : LIST * p.value_dim);
  s.zeros = take(widest);
  for (int i = 0; i < 3; ++i) s.marks[i] = reinterpret_cast<uint32_t*>(take(p.size[i] + 2));
  if (scratch) {
    *scratch = s;
    for (int64_t d = 0; d < widest; ++d) s.zeros[d] = 0;
  }
  return used;
}

// One tile and what it has accumulated. `careful` sets rows apart that hold NaN or infinity, so that they reach only the
// lanes that see them (0 * NaN would reach all); it is slow and only the second try of a tile whose result was not finite.
class BoxTile {
 public:
  BoxTile(const Boxes& problem, const Tiling& tiling, char* memory, int64_t b, int64_t number)
      : p(problem), side(tiling), b(b) {
    lay_out(p, &s, memory);
    for (int i = 2; i >= 0; --i) {
      strip[i] = side.strips[i][number % side.strip_count[i]];
      number /= side.strip_count[i];
    }
    for (int lane = 0; lane < LANES; ++lane) {
      token[lane] = 0;
      for (int i = 0; i < 3; ++i) {
        int at = side.at[i][lane];
        if (at >= strip[i].count) token[lane] = -1;
        if (token[lane] >= 0) token[lane] = token[lane] * p.size[i] + strip[i].start + at * p.dilation[i];
      }
    }
    for (int lane = 0; lane < LANES; ++lane) bit[lane] = 1 << lane;
    for (int i = 0; i < 3; ++i) mark(i);
  }

  void forward(int64_t h) {
    head = h;
    group = h / (p.heads / p.kv_heads);
    pack(p.q, head, p.storage, p.dim, p.scale * LOG2E, s.mine);
    for (careful = false;; careful = true) {
      clear(s.total, p.value_dim);
      top = splat(-INF);
      sum = vf{};
      each_list([&](int count) { forward_list(count); });
      if (careful || is_finite(s.total, p.value_dim)) break;
    }
    vf share = sum == 0.0f ? vf{} : 1.0f / sum;
    int64_t base = (b * p.heads + head) * tokens();
    unpack(s.total, p.value_dim, share, p.out + base * p.value_dim);
    for (int i = 0; i < LANES; ++i)
      if (token[i] >= 0) p.lse[base + token[i]] = sum[i] == 0 ? -INF : top[i] * LN2 + __builtin_logf(sum[i]);
  }

  // Gradients of a tile of queries, and delta = grad_out . out - grad_lse, which the keys' turn needs.
  void backward_queries(int64_t h) {
    head = h;
    group = h / (p.heads / p.kv_heads);
    int64_t base = (b * p.heads + head) * tokens();
    Rows grads = rows_at(p.grad_out), outs = rows_at(p.out);
    pack(outs, head, FP32, p.value_dim, 1.0f, s.mine);
    pack(grads, head, FP32, p.value_dim, 1.0f, s.mine_too);
    vf delta = {}, lse = splat(INF);
    for (int64_t e = 0; e < p.value_dim; ++e) delta += load(s.mine + e * LANES) * load(s.mine_too + e * LANES);
    pack(p.q, head, p.storage, p.dim, p.scale * LOG2E, s.mine);
    for (int i = 0; i < LANES; ++i) {
      if (token[i] < 0) continue;
      int64_t row = base + token[i];
      float change = delta[i] - (p.grad_lse ? p.grad_lse[row] : 0);
      if (p.lse[row] == -INF) change = 0;  // it sees nothing; lse = +inf makes its weights 0
      else lse[i] = p.lse[row] * LOG2E;
      p.delta[row] = delta[i] = change;
    }
    for (careful = false;; careful = true) {
      clear(s.total, p.dim);
      each_list([&](int count) {
        const float* keys[LIST];
        find_rows(p.k, group, p.dim, count, s.rows, keys);
        slopes(count, keys, [&](int) { return lse; }, [&](int) { return delta; });
        add(keys, count, int(p.dim), s.slopes, s.total);
      });
      if (careful || is_finite(s.total, p.dim)) break;
    }
    unpack(s.total, p.dim, splat(p.scale), p.dq + base * p.dim);
  }

  // Gradients of a tile of keys and values, from all heads that read them.
  void backward_keys(int64_t g) {
    group = g;
    int64_t shared = p.heads / p.kv_heads;
    pack(p.k, group, p.storage, p.dim, p.scale * LOG2E, s.mine);
    pack(p.v, group, p.storage, p.value_dim, 1.0f, s.mine_too);
    Rows grads = rows_at(p.grad_out);
    for (careful = false;; careful = true) {
      clear(s.total, p.dim);
      clear(s.total_too, p.value_dim);
      for (head = g * shared; head < (g + 1) * shared; ++head) {
        int64_t base = (b * p.heads + head) * tokens();
        each_list([&](int count) {
          const float *queries[LIST], *grad[LIST];
          for (int j = 0; j < count; ++j)
            if (p.lse[base + row[j]] == -INF) seen_by[j] = 0;
          find_rows(p.q, head, p.dim, count, s.rows, queries);
          for (int j = 0; j < count; ++j) grad[j] = reinterpret_cast<const float*>(row_of(grads, b, head, row[j], FP32));
          slopes(count, queries, grad, [&](int j) { return splat(p.lse[base + row[j]] * LOG2E); },
                 [&](int j) { return splat(p.delta[base + row[j]]); });
          add(grad, count, int(p.value_dim), s.scores, s.total_too);
          add(queries, count, int(p.dim), s.slopes, s.total);
        });
      }
      if (careful || (is_finite(s.total, p.dim) && is_finite(s.total_too, p.value_dim))) break;
    }
    int64_t base = (b * p.kv_heads + g) * tokens();
    unpack(s.total, p.dim, splat(p.scale), p.dk + base * p.dim);
    unpack(s.total_too, p.value_dim, splat(1.0f), p.dv + base * p.value_dim);
  }

 private:
  const Boxes& p;
  const Tiling& side;
  BoxScratch s;
  const int64_t b;
  int64_t head = 0, group = 0;
  Strip strip[3];
  int64_t token[LANES];    // of each lane; -1: none
  int64_t row[LIST];       // the other side's tokens now worked on
  uint32_t seen_by[LIST];  // and the lanes that see them
  vi bit;
  vf top, sum;
  bool careful = false;

  int64_t tokens() const { return p.size[0] * p.size[1] * p.size[2]; }

  // A contiguous fp32 tensor [B, H, N, E].
  Rows rows_at(const float* data) const {
    return {data, p.heads * tokens() * p.value_dim, tokens() * p.value_dim, p.value_dim};
  }

  // Which lanes see each coordinate of an axis: their intervals open and close.
  void mark(int axis) {
    const int32_t *first = side.first[axis], *last = side.last[axis], step = int32_t(p.dilation[axis]);
    uint32_t* marks = s.marks[axis];
    int width = (strip[axis].high - strip[axis].low) / step + 1;
    for (int w = 0; w <= width; ++w) marks[w] = 0;
    for (int c = 0; c < strip[axis].count; ++c) {
      int32_t x = strip[axis].start + c * step;
      if (last[x] < first[x]) continue;
      marks[(first[x] - strip[axis].low) / step] ^= side.lanes[axis][c];
      marks[(last[x] - strip[axis].low) / step + 1] ^= side.lanes[axis][c];
    }
    for (int w = 1; w <= width; ++w) marks[w] ^= marks[w - 1];
  }

  // Calls work(count) for all tokens that some lane sees, at most LIST at a time, in `row` and `seen_by`.
  template <class Work>
  void each_list(Work work) {
    int count = 0;
    const int64_t *step = p.dilation;
    for (int64_t x = strip[0].low; x <= strip[0].high; x += step[0]) {
      uint32_t outer = s.marks[0][(x - strip[0].low) / step[0]];
      for (int64_t y = strip[1].low; y <= strip[1].high; y += step[1]) {
        uint32_t both = outer & s.marks[1][(y - strip[1].low) / step[1]];
        if (!both) continue;
        int64_t line = (x * p.size[1] + y) * p.size[2];
        const uint32_t* inner = s.marks[2];
        for (int64_t z = strip[2].low; z <= strip[2].high; z += step[2]) {
          uint32_t lanes = both & *inner++;
          if (!lanes) continue;
          row[count] = line + z;
          seen_by[count] = lanes;
          if (++count == LIST) {
            work(count);
            count = 0;
          }
        }
      }
    }
    if (count) work(count);
  }

  vi visible(int j) const { return (splat(int32_t(seen_by[j])) & bit) != 0; }

  // Inner products, in whole blocks of rows; what is computed beyond `count` nobody reads.
  static void products(const float** rows, int count, const float* columns, int64_t depth, float* out) {
    int whole = (count + NARROW - 1) / NARROW * NARROW;
    for (int j = count; j < whole; ++j) rows[j] = rows[0];
    for (int j = 0; j < whole; j += NARROW) narrow_product<NARROW>(rows + j, columns, int(depth), out + j * LANES);
  }

  void forward_list(int count) {
    const float *keys[LIST], *values[LIST];
    find_rows(p.k, group, p.dim, count, s.rows, keys);
    products(keys, count, s.mine, p.dim, s.scores);
    vf high = top;
    for (int j = 0; j < count; ++j) {
      vf x = load(s.scores + j * LANES);
      x = visible(j) ? x : splat(-INF);
      store(s.scores + j * LANES, x);
      high = x > high ? x : high;
    }
    vf shift = high == -INF ? vf{} : high;  // nothing visible yet: any finite shift keeps weights 0
    vf factor = exp2v(top - shift), total = sum * factor;
    for (int j = 0; j < count; ++j) {
      vf weight = exp2v(load(s.scores + j * LANES) - shift);
      store(s.scores + j * LANES, weight);
      total += weight;
    }
    top = high;
    sum = total;
    find_rows(p.v, group, p.value_dim, count, s.rows_too, values);
    add(values, count, int(p.value_dim), s.scores, s.total, factor);
  }

  // Weights into `scores` and gradients of the scores into `slopes`, for queries across the lanes.
  template <class Lse, class Delta>
  void slopes(int count, const float** keys, Lse lse, Delta delta) {
    const float* values[LIST];
    find_rows(p.v, group, p.value_dim, count, s.rows_too, values);
    slopes(count, keys, values, lse, delta);
  }

  template <class Lse, class Delta>
  void slopes(int count, const float** rows, const float** rows_too, Lse lse, Delta delta) {
    products(rows, count, s.mine, p.dim, s.scores);
    products(rows_too, count, s.mine_too, p.value_dim, s.slopes);
    for (int j = 0; j < count; ++j) {
      float *score = s.scores + j * LANES, *slope = s.slopes + j * LANES;
      vi seen = visible(j);
      vf weight = exp2v(load(score) - lse(j));
      store(score, seen ? weight : vf{});
      store(slope, seen ? weight * (load(slope) - delta(j)) : vf{});
    }
  }

  // Where the rows of `x` are, as fp32.
  void find_rows(const Rows& x, int64_t h, int64_t dim, int count, float* converted, const float** found) {
    for (int j = 0; j < count; ++j) {
      const char* place = row_of(x, b, h, row[j], p.storage);
      if (p.storage == FP32) {
        found[j] = reinterpret_cast<const float*>(place);
      } else {
        found[j] = converted + j * dim;
        widen_row(place, dim, p.storage, converted + j * dim);
      }
    }
  }

  // total = total * factor + weights . rows
  void add(const float* const* rows, int count, int channels, const float* weights, float* total, vf factor = splat(1.0f)) {
    if (!careful) return narrow_accumulate(rows, count, channels, weights, factor, total);
    const float* clean[LIST];
    for (int j = 0; j < count; ++j) clean[j] = has_poison(rows[j], channels) ? s.zeros : rows[j];
    narrow_accumulate(clean, count, channels, weights, factor, total);
    for (int j = 0; j < count; ++j)
      if (clean[j] == s.zeros)
        for (int e = 0; e < channels; ++e) {
          vf weight = load(weights + j * LANES), old = load(total + e * LANES);
          store(total + e * LANES, visible(j) ? old + weight * rows[j][e] : old);
        }
  }

  static void clear(float* total, int64_t channels) {
    for (int64_t place = 0; place < channels * LANES; place += LANES) store(total + place, vf{});
  }

  static bool is_finite(const float* total, int64_t channels) { return !has_poison(total, channels * LANES); }

  // Rows of the lanes' tokens, times `factor`, across the lanes; lanes without a token hold zeros.
  void pack(const Rows& x, int64_t h, int32_t storage, int64_t dim, float factor, float* out) {
    const char *place[LANES], *nothing = reinterpret_cast<const char*>(s.zeros);
    for (int i = 0; i < LANES; ++i) place[i] = token[i] < 0 ? nothing : row_of(x, b, h, token[i], storage);
    pack_rows(place, storage, dim, factor, out, LANES);
  }

  // The inverse, into rows of a contiguous [N, dim].
  void unpack(const float* columns, int64_t dim, vf factor, float* out) {
    float* place[LANES];
    for (int i = 0; i < LANES; ++i) place[i] = token[i] < 0 ? nullptr : out + token[i] * dim;
    unpack_rows(columns, dim, factor, place);
  }
};

static const BoxesEngine BOXES = {
    .scratch = [](const Boxes& p) { return lay_out(p, nullptr, nullptr); },
    .forward = [](const Boxes& p, const Tiling& tiling, char* memory, int64_t b, int64_t h, int64_t tile) {
      BoxTile(p, tiling, memory, b, tile).forward(h);
    },
    .backward_queries = [](const Boxes& p, const Tiling& tiling, char* memory, int64_t b, int64_t h, int64_t tile) {
      BoxTile(p, tiling, memory, b, tile).backward_queries(h);
    },
    .backward_keys = [](const Boxes& p, const Tiling& tiling, char* memory, int64_t b, int64_t g, int64_t tile) {
      BoxTile(p, tiling, memory, b, tile).backward_keys(g);
    },
};

}  // namespace saccade::SACCADE_ISA
