// JSON string escapes as the official JSONGPT2Tokenizer writes and reads them.
//
// Writing: Python's json.dumps(text)[1:-1]. Reading: json.loads of the quoted text, and where that
// refuses, text.encode().decode("unicode_escape", "ignore"): Python's own escapes, with malformed
// ones dropped and the bytes of raw non-ASCII characters read as Latin-1 ("é" becomes "Ã©").
// Two deviations, both towards valid UTF-8: \u escapes of a surrogate pair are joined under either
// rule, and a surrogate without its other half becomes U+FFFD. \N{name} counts as an unknown name
// and is dropped.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "deltafox/tokenizer.h"

namespace deltafox {

// ASCII text: what JSON must escape and everything outside ' '..'~' is escaped.
std::string escape_json(std::string_view utf8);

// Appends the meaning of as much of `text` as is certain and returns the bytes consumed; the rest,
// an incomplete escape, belongs in front of the next call's text. `last`: nothing follows, so all
// is consumed. `text` is valid UTF-8. JSON's rules apply up to the first thing they refuse, from
// there on Python's.
std::size_t unescape(std::string_view text, bool last, detail::UnescapeState& state,
                     std::string& out);

// The meaning of a whole text: if JSON refuses any of it, Python's rules apply from its start.
std::string unescape_all(std::string_view text);

}  // namespace deltafox
