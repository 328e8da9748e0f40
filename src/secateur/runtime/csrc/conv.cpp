// Convolutions of one image, for one instruction set. The padded image lies in the buffer as lines, where every tap of the window is one
// constant offset and no im2col is needed; a window of one pixel needs no lines, and its sums go straight to the result.
#include "blocks.h"

namespace secateur {
namespace SECATEUR_ISA {
namespace {

// The padded image is cut into its phases (one where the stride is 1), and each phase is one line: rows one after the other. A row of
// output pixels is `line` long; the last few of it fall on padding and are not copied out.
struct Plan {
  int64_t line, length, halo, phases, stretch;
  explicit Plan(const Window& w) {
    line = w.stride_h == 1 && w.stride_w == 1 ? w.width + w.pad_w  // what is left of a row is padding for the end of the one before
                                              : w.out_width + (w.kernel_w - 1) * w.dilation_w / w.stride_w;
    line = std::max(line, w.out_width);
    length = (w.out_height - 1) * line + w.out_width;
    halo = (w.kernel_h - 1) * w.dilation_h / w.stride_h * line + (w.kernel_w - 1) * w.dilation_w / w.stride_w;
    phases = w.stride_h * w.stride_w;
    // Stretches long beside their halo, in a buffer that fits the second cache.
    const int64_t room = (1 << 17) / std::max<int64_t>(1, std::min<int64_t>(w.channels, 1 << 16) * std::min<int64_t>(phases, 1 << 16)) - halo;
    const int64_t tiles = std::max<int64_t>(1, std::min(room, length) / TILE);
    const int64_t all = (length + TILE - 1) / TILE;
    stretch = (all + (all + tiles - 1) / tiles - 1) / ((all + tiles - 1) / tiles) * TILE;
  }
  int64_t parts() const { return (length + stretch - 1) / stretch; }
  // Floats of one phase of one channel in the buffer: an odd number of cache lines, so that the same tile of all channels does not fall on
  // a few places of the first cache.
  int64_t row() const { return ((stretch + halo + 15) / 16 | 1) * 16; }
};

// Positions [at, at + n) of one phase of a padded channel, as pieces of rows; they are the same for all channels.
void pieces_in(const Window& w, const Plan& p, int64_t phase, int64_t at, int64_t n, std::vector<Piece>& found) {
  const int64_t py = phase / w.stride_w, px = phase % w.stride_w;
  found.clear();
  for (int64_t row = at / p.line, to = 0; to < n; row++) {
    const int64_t j = at - row * p.line, count = std::min(n - to, p.line - j);  // columns j .. j + count of this row
    const int64_t y = row * w.stride_h + py - w.pad_h, x = j * w.stride_w + px - w.pad_w;  // of the first; inside the image from left to right
    int64_t left = std::clamp<int64_t>((w.stride_w - 1 - x) / w.stride_w, 0, count);
    int64_t right = std::clamp<int64_t>((w.width - x + w.stride_w - 1) / w.stride_w, left, count);
    if (y < 0 || y >= w.height) left = right = count;
    found.push_back({y * w.width + x + w.stride_w * left, to, left, right - left, count - right});
    at += count, to += count;
  }
}

// Zeros, in whole vectors: what lies behind them in the buffer is written later.
inline void clear(float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += WIDTH) *reinterpret_cast<Loose*>(to + i) = Vector{};
}

void fill(const Window& w, const std::vector<Piece>& pieces, const float* image, float* line) {
  for (const Piece& piece : pieces) {
    float* to = line + piece.to;
    clear(to, piece.left);
    to += piece.left;
    if (w.stride_w == 1) {
      in_lanes<WIDTH>(to, piece.inside, Each{image + piece.from});
    } else if (w.stride_w == 2 && piece.inside) {  // the last apart: what follows it may be the end of the tensor
      in_lanes<WIDTH>(to, piece.inside - 1, EverySecond{image + piece.from});
      to[piece.inside - 1] = image[piece.from + 2 * (piece.inside - 1)];
    } else {
      for (int64_t i = 0; i < piece.inside; i++) to[i] = image[piece.from + w.stride_w * i];
    }
    clear(to + piece.inside, piece.right);
  }
}

// Where the columns [t, t + wide) of a tile go in the result; what is on padding goes nowhere.
void pieces_out(const Window& w, const Plan& p, int64_t t, int64_t wide, std::vector<Piece>& found) {
  found.clear();
  for (int64_t at = t; at < t + wide;) {
    const int64_t line = at / p.line, j = at - line * p.line, count = std::min(t + wide - at, p.line - j);
    if (j < w.out_width) found.push_back({at - t, line * w.out_width + j, 0, std::min(count, w.out_width - j), 0});
    at += count;
  }
}

thread_local std::vector<Piece> pieces;
thread_local std::vector<std::vector<Piece>> lines;  // of each phase

// A window of one pixel: its tiles are copied as they lie, and the sums go straight to the result.
void pointwise(const Matrix& m, const Window& w, const float* x, const float* plus, float* y, int64_t part, int64_t from, int64_t to) {
  const int64_t pixels = w.out_height * w.out_width, image = w.height * w.width, t = part * TILE, wide = std::min(TILE, pixels - t);
  float* in = inputs.floats(w.channels * TILE);
  if (w.stride_h == 1 && w.stride_w == 1) {
    if (wide == TILE) {
      for (int64_t c = 0; c < w.channels; c++) {
        const float* from = x + c * image + t;
        for (int64_t i = 0; i < TILE; i += 16) __builtin_prefetch(from + TILE + i, 0, 2);  // the next tile
        std::memcpy(in + c * TILE, from, TILE * 4);
      }
    } else {
      for (int64_t c = 0; c < w.channels; c++) {
        std::memcpy(in + c * TILE, x + c * image + t, wide * 4);
        std::memset(in + c * TILE + wide, 0, (TILE - wide) * 4);
      }
    }
  } else {
    int64_t where[TILE] = {};
    for (int64_t i = 0; i < wide; i++) where[i] = (t + i) / w.out_width * w.stride_h * w.width + (t + i) % w.out_width * w.stride_w;
    for (int64_t c = 0; c < w.channels; c++)
      for (int64_t i = 0; i < TILE; i++) in[c * TILE + i] = x[c * image + where[i]];
  }
  const int64_t begin = from * m.r * pixels + t;
  any_blocks(m, in, Rows{m.index, 0}, Tile{y + begin, plus ? plus + begin : nullptr, pixels, wide, false, nullptr}, from, to);
}

}  // namespace

int64_t conv_parts(const Window& w) { return w.pointwise() ? (w.out_height * w.out_width + TILE - 1) / TILE : Plan(w).parts(); }

int64_t conv_buffer(const Window& w) {
  if (w.pointwise()) return w.channels < INT32_MAX ? w.channels * TILE : -1;
  const Plan p(w);
  int64_t planes, floats;
  return __builtin_mul_overflow(w.channels, p.phases, &planes) || __builtin_mul_overflow(planes, p.row(), &floats) ? -1 : floats;
}

void conv_offsets(const Window& w, int32_t* offsets) {
  if (w.pointwise()) return;  // they are not asked for
  const Plan p(w);
  const int64_t taps = w.kernel_h * w.kernel_w;
  int32_t* tap = offsets;  // of the first channel; the others lie as far apart as their lines
  for (int64_t down = 0; down < w.kernel_h * w.dilation_h; down += w.dilation_h)
    for (int64_t right = 0; right < w.kernel_w * w.dilation_w; right += w.dilation_w) {
      const int64_t phase = down % w.stride_h * w.stride_w + right % w.stride_w;
      *tap++ = int32_t(phase * p.row() + down / w.stride_h * p.line + right / w.stride_w);
    }
  for (int64_t i = taps; i < w.channels * taps; i++) offsets[i] = int32_t(offsets[i - taps] + p.phases * p.row());
}

void conv(const Matrix& m, const Window& w, const int32_t* offsets, const float* x, const float* plus, float* y, int64_t part, int64_t from,
          int64_t to) {
  if (w.pointwise()) return pointwise(m, w, x, plus, y, part, from, to);
  const Plan p(w);
  const int64_t begin = part * p.stretch, end = std::min(p.length, begin + p.stretch), pixels = w.out_height * w.out_width;
  const int64_t rows = std::min(to * m.r, m.rows) - from * m.r;
  float* in = inputs.floats(w.channels * p.phases * p.row() + TILE);
  if (lines.size() < static_cast<size_t>(p.phases)) lines.resize(p.phases);
  for (int64_t phase = 0; phase < p.phases; phase++) pieces_in(w, p, phase, begin, p.row(), lines[phase]);
  for (int64_t c = 0; c < w.channels; c++)  // in the order in which they lie
    for (int64_t phase = 0; phase < p.phases; phase++) fill(w, lines[phase], x + c * w.height * w.width, in + (c * p.phases + phase) * p.row());
  std::memset(in + w.channels * p.phases * p.row(), 0, TILE * 4);
  y += from * m.r * pixels;
  if (plus) plus += from * m.r * pixels;
  for (int64_t t = begin; t < end; t += TILE) {
    const int64_t wide = std::min(TILE, end - t);
    pieces_out(w, p, t, wide, pieces);
    const Tile tile{y, plus, pixels, wide, false, &pieces};
    if (m.sets() == 1) {
      any_blocks(m, in + t - begin, Offsets{m.index, offsets}, tile, from, to);
    } else {  // summed in a buffer, so that the pieces are copied once
      float* c = outputs.floats((to - from) * m.r * TILE);
      if (plus) tile.take(plus, rows, c);
      any_blocks(m, in + t - begin, Offsets{m.index, offsets}, Tile{c, plus ? c : nullptr, TILE, wide, true, nullptr}, from, to);
      tile.put(c, rows, y);
    }
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
