// From the callbacks of nghttp2 to the functions of a session.
#include "session.hpp"

#include <cstring>
#include <exception>

namespace unroll {

namespace {

constexpr uint64_t reset_burst = 20'000;          // calls that a client cancels at once
constexpr uint64_t reset_rate = 5'000;            // calls that a client cancels per second

nghttp2_option* make_options() {
    nghttp2_option* options;
    if (nghttp2_option_new(&options)) throw std::bad_alloc();
    nghttp2_option_set_no_auto_window_update(options, 1);
    // nghttp2 would keep hundreds of closed streams per connection for a tree of priorities, which gRPC does not use.
    nghttp2_option_set_no_closed_streams(options, 1);
    // In gRPC, values can begin and end with spaces.
    nghttp2_option_set_no_rfc9113_leading_and_trailing_ws_validation(options, 1);
    nghttp2_option_set_stream_reset_rate_limit(options, reset_burst, reset_rate);
    return options;
}

}  // namespace

// Callbacks of nghttp2. No exception may pass through its C code.
struct Callbacks {
    template <class Body>
    static int guarded(Body body) {
        try {
            return body();
        } catch (const std::exception&) {
            return NGHTTP2_ERR_CALLBACK_FAILURE;
        }
    }

    static Session& of(void* data) { return *static_cast<Session*>(data); }

    static int begin_frame(nghttp2_session*, const nghttp2_frame_hd* head, void* data) {
        if (head->type != NGHTTP2_DATA && head->type != NGHTTP2_HEADERS && head->type != NGHTTP2_RST_STREAM)
            of(data).charge();
        return 0;
    }

    static int begin_headers(nghttp2_session*, const nghttp2_frame* frame, void* data) {
        return guarded([&] {
            if (of(data).left_) return int{NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE};
            if (frame->headers.cat == NGHTTP2_HCAT_REQUEST) of(data).begin(frame->hd.stream_id);
            return 0;
        });
    }

    static int add_header(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                          const uint8_t* value, size_t value_size, uint8_t, void* data) {
        return guarded([&] {
            Call* call = of(data).call_of(frame->hd.stream_id);
            if (!call) return 0;
            return of(data).add_header(*call, {reinterpret_cast<const char*>(name), name_size},
                                       {reinterpret_cast<const char*>(value), value_size});
        });
    }

    static int add_data(nghttp2_session*, uint8_t, int32_t id, const uint8_t* chunk, size_t size, void* data) {
        return guarded([&] {
            if (Call* call = of(data).call_of(id)) of(data).add_data(*call, chunk, size);
            return 0;
        });
    }

    static int end_frame(nghttp2_session*, const nghttp2_frame* frame, void* data) {
        return guarded([&] {
            Session& session = of(data);
            const bool acknowledges = frame->hd.flags & NGHTTP2_FLAG_ACK;
            if (frame->hd.type == NGHTTP2_SETTINGS) {
                session.greeted_ = true;
                if (acknowledges) session.widen_accepted();
            } else if (frame->hd.type == NGHTTP2_PING && !acknowledges) {
                session.pinged();
            } else if (frame->hd.type == NGHTTP2_PING && !std::memcmp(frame->ping.opaque_data, drain_ping, 8)) {
                session.leave();
            }
            if (frame->hd.type != NGHTTP2_DATA && frame->hd.type != NGHTTP2_HEADERS) return 0;
            const bool ends = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
            if (frame->hd.type == NGHTTP2_DATA && !ends && frame->hd.length == frame->data.padlen) session.charge();
            Call* call = session.call_of(frame->hd.stream_id);
            if (!call) return 0;
            if (!call->headers_done_) session.end_headers(*call);
            if (ends) session.half_close(*call);
            return 0;
        });
    }

    static int sent_frame(nghttp2_session*, const nghttp2_frame* frame, void* data) {
        return guarded([&] {
            Session& session = of(data);
            if (frame->hd.type == NGHTTP2_RST_STREAM && frame->rst_stream.error_code != NGHTTP2_NO_ERROR)
                session.charge();
            if (frame->hd.type != NGHTTP2_DATA && frame->hd.type != NGHTTP2_HEADERS) return 0;
            session.sent();
            const Call* call = session.call_of(frame->hd.stream_id);
            // The rest of a request that is answered is not needed.
            if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM && call && !call->half_closed_)
                return nghttp2_submit_rst_stream(session.http2_, NGHTTP2_FLAG_NONE, call->id_, NGHTTP2_NO_ERROR);
            return 0;
        });
    }

    static int close(nghttp2_session*, int32_t id, uint32_t, void* data) {
        return guarded([&] {
            if (Call* call = of(data).call_of(id)) of(data).close(*call);
            return 0;
        });
    }

    static nghttp2_session_callbacks* make() {
        nghttp2_session_callbacks* callbacks;
        if (nghttp2_session_callbacks_new(&callbacks)) throw std::bad_alloc();
        nghttp2_session_callbacks_set_on_begin_frame_callback(callbacks, begin_frame);
        nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, begin_headers);
        nghttp2_session_callbacks_set_on_header_callback(callbacks, add_header);
        nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, add_data);
        nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, end_frame);
        nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, sent_frame);
        nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, close);
        return callbacks;
    }
};

nghttp2_session* new_http2(Session& session) {
    static nghttp2_session_callbacks* const callbacks = Callbacks::make();
    static nghttp2_option* const options = make_options();
    nghttp2_session* http2;
    if (nghttp2_session_server_new2(&http2, callbacks, &session, options)) throw std::bad_alloc();
    return http2;
}

}  // namespace unroll
