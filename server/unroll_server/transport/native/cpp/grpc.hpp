// The parts of gRPC on top of HTTP/2: message framing, compression, and the encodings of headers.
// See https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace unroll {

// Names and values. Values under a name that ends in "-bin" are bytes, others ASCII.
using Metadata = std::vector<std::pair<std::string, std::string>>;

enum Code : int {
    ok = 0,
    cancelled = 1,
    deadline_exceeded = 4,
    resource_exhausted = 8,
    unimplemented = 12,
    internal = 13,
};

struct Status {
    int code = ok;
    std::string details;
    Metadata trailers;
};

enum class Encoding { identity, deflate, gzip, unknown };

constexpr char accepted_encodings[] = "identity, deflate, gzip";

Encoding encoding_named(std::string_view name);

bool is_binary(std::string_view name);
std::string base64_encoded(std::string_view bytes);

// Appends the values of a binary header: one, or several with commas between. Returns false if one is not base64.
bool add_binary(std::string_view name, std::string_view value, Metadata& metadata);

std::string percent_encoded(std::string_view text);

// Returns the seconds of a grpc-timeout; none if malformed.
std::optional<double> timeout_seconds(std::string_view value);

// True for application/grpc, with or without a subtype or parameters.
bool is_grpc(std::string_view content_type);

// Cuts a stream of bytes into messages.
class MessageReader {
   public:
    enum class Result { incomplete, message, failed };

    void append(const uint8_t* data, size_t size);

    // Returns the next message, decompressed. `limit` is the most bytes of a message, compressed or not.
    Result next(Encoding encoding, size_t limit, std::string& message, Status& problem);

    // True if `next` has a message or an error.
    bool ready(size_t limit) const;

    size_t size() const { return buffer_.size() - begin_; }
    void clear() { buffer_ = {}, begin_ = 0; }

   private:
    const uint8_t* head() const { return reinterpret_cast<const uint8_t*>(buffer_.data() + begin_); }
    size_t length() const;  // of the next message, from its prefix

    std::string buffer_;
    size_t begin_ = 0;
};

}  // namespace unroll
