// What training reads: a token file, a zarr array's metadata, or a compressed chunk. The first byte
// says which.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "deltafox/error.h"
#include "io/codec.h"
#include "io/token_file.h"
#include "io/zarr.h"

using namespace deltafox;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::span<const std::byte> rest(reinterpret_cast<const std::byte*>(data) + 1, size - 1);
  try {
    switch (data[0] % 5) {
      case 0:
        io::parse_token_file(rest, "fuzz");
        break;
      case 1:
        io::parse_zarr_metadata({reinterpret_cast<const char*>(rest.data()), rest.size()}, "fuzz");
        break;
      default: {
        constexpr io::Codec kCodecs[] = {io::Codec::kBlosc, io::Codec::kZstd, io::Codec::kZlib};
        std::vector<std::byte> chunk(256);
        io::decompress(kCodecs[data[0] % 5 - 2], rest, chunk, "fuzz");
      }
    }
  } catch (const Error&) {
  }
  return 0;
}
