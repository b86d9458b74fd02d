#include "io/codec.h"

#include <blosc.h>
#include <zlib.h>
#include <zstd.h>

#include <cstring>
#include <limits>

#include "core/error.h"
#include "io/json.h"

namespace deltafox::io {
namespace {

void decompress_blosc(std::span<const std::byte> from, std::span<std::byte> to,
                      const std::string& file) {
  std::size_t size = 0;
  if (blosc_cbuffer_validate(from.data(), from.size(), &size) != 0) {
    fail("{}: not a whole blosc chunk", file);
  }
  if (size != to.size()) fail("{}: holds {} bytes, expected {}", file, size, to.size());
  // The _ctx function has no global state.
  if (blosc_decompress_ctx(from.data(), to.data(), to.size(), 1) != static_cast<int>(size)) {
    fail("{}: damaged blosc chunk", file);
  }
}

void decompress_zstd(std::span<const std::byte> from, std::span<std::byte> to,
                     const std::string& file) {
  const std::size_t size = ZSTD_decompress(to.data(), to.size(), from.data(), from.size());
  if (ZSTD_isError(size) != 0) fail("{}: zstd: {}", file, ZSTD_getErrorName(size));
  if (size != to.size()) fail("{}: holds {} bytes, expected {}", file, size, to.size());
}

void decompress_zlib(std::span<const std::byte> from, std::span<std::byte> to,
                     const std::string& file) {
  constexpr std::size_t kMax = std::numeric_limits<uInt>::max();
  if (from.size() > kMax || to.size() > kMax) fail("{}: is longer than {} bytes", file, kMax);
  constexpr int kEitherHeader = 32;  // zlib's or gzip's
  z_stream stream{};
  if (inflateInit2(&stream, MAX_WBITS + kEitherHeader) != Z_OK) fail("{}: out of memory", file);
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(from.data()));
  stream.avail_in = static_cast<uInt>(from.size());
  stream.next_out = reinterpret_cast<Bytef*>(to.data());
  stream.avail_out = static_cast<uInt>(to.size());
  const int result = inflate(&stream, Z_FINISH);
  const bool whole = result == Z_STREAM_END && stream.avail_out == 0 && stream.avail_in == 0;
  inflateEnd(&stream);
  if (!whole) fail("{}: not a zlib stream of {} bytes", file, to.size());
}

}  // namespace

Codec codec_named(const std::string& name, const std::string& file) {
  if (name == "blosc") return Codec::kBlosc;
  if (name == "zstd") return Codec::kZstd;
  if (name == "zlib") return Codec::kZlib;
  if (name == "gzip") return Codec::kGzip;
  fail("{}: compressor '{}' is none of blosc, zstd, zlib, gzip", file, printable(name));
}

void decompress(Codec codec, std::span<const std::byte> from, std::span<std::byte> to,
                const std::string& file) {
  switch (codec) {
    case Codec::kNone:
      if (from.size() != to.size()) {
        fail("{}: holds {} bytes, expected {}", file, from.size(), to.size());
      }
      std::memcpy(to.data(), from.data(), to.size());
      return;
    case Codec::kBlosc:
      return decompress_blosc(from, to, file);
    case Codec::kZstd:
      return decompress_zstd(from, to, file);
    case Codec::kZlib:
    case Codec::kGzip:
      return decompress_zlib(from, to, file);
  }
}

}  // namespace deltafox::io
