#include "grpc.hpp"

#include <zlib.h>

#include <algorithm>
#include <array>

namespace unroll {

namespace {

constexpr char base64_digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
constexpr size_t prefix = 5;         // bytes before a message: its compressed flag and its size
constexpr size_t compact = 1 << 16;  // consumed bytes above which the rest is moved to the front
constexpr size_t reserved = 256 << 10;  // bytes that are reserved for a message of which few have come

constexpr std::array<int8_t, 256> make_base64_values() {
    std::array<int8_t, 256> values{};
    for (auto& value : values) value = -1;
    for (int8_t digit = 0; digit < 64; digit++) values[static_cast<uint8_t>(base64_digits[digit])] = digit;
    return values;
}

constexpr auto base64_values = make_base64_values();

bool base64_decode(std::string_view text, std::string& bytes) {
    while (!text.empty() && text.back() == '=') text.remove_suffix(1);
    if (text.size() % 4 == 1) return false;
    bytes.reserve(text.size() * 3 / 4);
    uint32_t bits = 0;
    int count = 0;
    for (char digit : text) {
        const int8_t value = base64_values[static_cast<uint8_t>(digit)];
        if (value < 0) return false;
        bits = bits << 6 | static_cast<uint32_t>(value);
        count += 6;
        if (count >= 8) {
            count -= 8;
            bytes.push_back(static_cast<char>(bits >> count));
        }
    }
    return true;
}

Status too_large(size_t size, size_t limit) {
    const std::string text = std::to_string(size) + " vs. " + std::to_string(limit);
    return {resource_exhausted, "SERVER: Received message larger than max (" + text + ")", {}};
}

// Decompresses, and stops at the limit, since bytes can expand a thousandfold.
bool inflated(std::string_view compressed, Encoding encoding, size_t limit, std::string& message, Status& problem) {
    z_stream stream{};
    constexpr int gzip_window = 16 + MAX_WBITS;
    if (inflateInit2(&stream, encoding == Encoding::gzip ? gzip_window : MAX_WBITS) != Z_OK) {
        problem = {internal, "Decompression failed", {}};
        return false;
    }
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(compressed.data()));
    stream.avail_in = static_cast<uInt>(compressed.size());
    int result = Z_OK;
    // One byte above the limit shows that there is more.
    for (size_t room = 4 * compressed.size() + 64; result == Z_OK; room *= 2) {
        const size_t size = message.size();
        message.resize(std::min(size + room, limit + 1));
        stream.next_out = reinterpret_cast<Bytef*>(message.data() + size);
        stream.avail_out = static_cast<uInt>(message.size() - size);
        result = inflate(&stream, Z_NO_FLUSH);
        message.resize(message.size() - stream.avail_out);
        if (message.size() > limit) break;
    }
    inflateEnd(&stream);
    if (message.size() > limit) {
        problem = too_large(message.size(), limit);
        return false;
    }
    if (result != Z_STREAM_END) problem = {internal, "Decompression failed", {}};
    return result == Z_STREAM_END;
}

}  // namespace

Encoding encoding_named(std::string_view name) {
    if (name == "identity") return Encoding::identity;
    if (name == "deflate") return Encoding::deflate;
    return name == "gzip" ? Encoding::gzip : Encoding::unknown;
}

bool is_binary(std::string_view name) { return name.size() > 4 && name.substr(name.size() - 4) == "-bin"; }

std::string base64_encoded(std::string_view bytes) {
    std::string text;
    text.reserve((bytes.size() + 2) / 3 * 4);
    uint32_t bits = 0;
    int count = 0;
    for (char byte : bytes) {
        bits = bits << 8 | static_cast<uint8_t>(byte);
        for (count += 8; count >= 6; count -= 6) text.push_back(base64_digits[bits >> (count - 6) & 63]);
    }
    if (count) text.push_back(base64_digits[bits << (6 - count) & 63]);
    return text;
}

bool add_binary(std::string_view name, std::string_view value, Metadata& metadata) {
    while (true) {
        const size_t comma = value.find(',');
        std::string bytes;
        if (!base64_decode(value.substr(0, comma), bytes)) return false;
        metadata.emplace_back(name, std::move(bytes));
        if (comma == std::string_view::npos) return true;
        value.remove_prefix(comma + 1);
    }
}

std::string percent_encoded(std::string_view text) {
    constexpr char digits[] = "0123456789ABCDEF";
    std::string encoded;
    encoded.reserve(text.size());
    for (char each : text) {
        const auto byte = static_cast<uint8_t>(each);
        if (byte >= 0x20 && byte <= 0x7E && byte != '%') {
            encoded.push_back(each);
        } else {
            encoded += {'%', digits[byte >> 4], digits[byte & 15]};
        }
    }
    return encoded;
}

std::optional<double> timeout_seconds(std::string_view value) {
    if (value.size() < 2 || value.size() > 9) return {};
    double number = 0;
    for (char digit : value.substr(0, value.size() - 1)) {
        if (digit < '0' || digit > '9') return {};
        number = 10 * number + (digit - '0');
    }
    switch (value.back()) {
        case 'H': return number * 3600;
        case 'M': return number * 60;
        case 'S': return number;
        case 'm': return number * 1e-3;
        case 'u': return number * 1e-6;
        case 'n': return number * 1e-9;
        default: return {};
    }
}

bool is_grpc(std::string_view content_type) {
    constexpr std::string_view expected = "application/grpc";
    if (content_type.substr(0, expected.size()) != expected) return false;
    content_type.remove_prefix(expected.size());
    return content_type.empty() || content_type[0] == '+' || content_type[0] == ';';
}

void MessageReader::append(const uint8_t* data, size_t size) {
    buffer_.append(reinterpret_cast<const char*>(data), size);
    // At once for the whole message, unless that is far more than what has come.
    if (this->size() >= prefix && this->size() < prefix + length())
        buffer_.reserve(begin_ + std::min(prefix + length(), reserved + 2 * this->size()));
}

size_t MessageReader::length() const {
    const uint8_t* bytes = head();
    return size_t{bytes[1]} << 24 | size_t{bytes[2]} << 16 | size_t{bytes[3]} << 8 | bytes[4];
}

bool MessageReader::ready(size_t limit) const {
    return size() >= prefix && (head()[0] > 1 || length() > limit || size() >= prefix + length());
}

MessageReader::Result MessageReader::next(Encoding encoding, size_t limit, std::string& message, Status& problem) {
    if (size() < prefix) return Result::incomplete;
    const uint8_t flag = head()[0];
    const size_t length = this->length();
    if (flag > 1 || (flag == 1 && encoding == Encoding::identity)) {
        problem = {internal, flag > 1 ? "Bad GRPC frame type" : "Compressed message without grpc-encoding", {}};
        return Result::failed;
    }
    if (length > limit) {
        problem = too_large(length, limit);
        return Result::failed;
    }
    if (size() < prefix + length) return Result::incomplete;
    const std::string_view body(buffer_.data() + begin_ + prefix, length);
    if (flag == 0 && begin_ == 0 && buffer_.size() == prefix + length) {
        message = std::move(buffer_);
        message.erase(0, prefix);
        clear();
        return Result::message;
    }
    if (flag == 0) {
        message.assign(body);
    } else if (!inflated(body, encoding, limit, message, problem)) {
        return Result::failed;
    }
    begin_ += prefix + length;
    if (begin_ == buffer_.size()) {
        clear();
    } else if (begin_ >= compact) {
        buffer_.erase(0, begin_);
        begin_ = 0;
    }
    return Result::message;
}

}  // namespace unroll
