// Decompression of the chunks of arrays: blosc, zstd, zlib and gzip, or none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace deltafox::io {

enum class Codec : std::uint8_t { kNone, kBlosc, kZstd, kZlib, kGzip };

// "blosc", "zstd", "zlib", "gzip", as zarr names them. Throws Error starting with `file`.
Codec codec_named(const std::string& name, const std::string& file);

// Fills `to` with what `from` holds compressed. Throws Error starting with `file` if `from` is
// damaged or does not hold just so many bytes. May be called from several threads.
void decompress(Codec codec, std::span<const std::byte> from, std::span<std::byte> to,
                const std::string& file);

}  // namespace deltafox::io
