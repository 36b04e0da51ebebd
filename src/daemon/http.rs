//! The little of HTTP/1.1 that the control socket speaks: one request for each connection, without a body.
//!
//! Reading a request is a function of its bytes alone. Nothing of a request is kept, and nothing in it sets a size.

/// Most bytes of a request, headers included.
pub const REQUEST_BYTES_MAX: usize = 8 << 10;

/// Most headers of a request or a response.
const HEADERS_MAX: usize = 64;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `GET /metrics`: figures in the text format of Prometheus.
    Metrics,
    /// `GET /v1/status`: JSON.
    Status,
    /// `POST /v1/upgrade`: another process takes over; JSON.
    Upgrade,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is no HTTP, or has a body.
    Bad,
    /// Nothing has that name.
    NotFound,
    /// It is asked for by another method.
    Method(&'static str),
    /// It did not come in time.
    Late,
    /// It is longer than [`REQUEST_BYTES_MAX`] or has too many headers.
    TooLarge,
    /// What was asked for cannot be told.
    Failed,
    /// Too many are asking.
    Busy,
}

/// What the bytes that have come so far are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The beginning of a request; there must be more.
    Incomplete,
    /// A whole one.
    Whole(Route),
    /// One that is not answered.
    Refused(Refusal),
}

impl Refusal {
    fn status(self) -> &'static str {
        match self {
            Self::Bad => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::Method(_) => "405 Method Not Allowed",
            Self::Late => "408 Request Timeout",
            Self::TooLarge => "431 Request Header Fields Too Large",
            Self::Failed => "500 Internal Server Error",
            Self::Busy => "503 Service Unavailable",
        }
    }
}

/// Reads a request. What follows its headers is not looked at.
pub fn read_request(bytes: &[u8]) -> Request {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(len)) if len <= REQUEST_BYTES_MAX => {}
        Ok(httparse::Status::Partial) if bytes.len() < REQUEST_BYTES_MAX => return Request::Incomplete,
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return Request::Refused(Refusal::TooLarge),
        Err(_) => return Request::Refused(Refusal::Bad),
    }
    let has_body = request.headers.iter().any(|header| {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        is("transfer-encoding") || is("content-length") && header.value != b"0"
    });
    if has_body {
        return Request::Refused(Refusal::Bad);
    }
    match (request.method, request.path) {
        (Some("GET"), Some("/metrics")) => Request::Whole(Route::Metrics),
        (Some("GET"), Some("/v1/status")) => Request::Whole(Route::Status),
        (Some("POST"), Some("/v1/upgrade")) => Request::Whole(Route::Upgrade),
        (_, Some("/metrics" | "/v1/status")) => Request::Refused(Refusal::Method("GET")),
        (_, Some("/v1/upgrade")) => Request::Refused(Refusal::Method("POST")),
        _ => Request::Refused(Refusal::NotFound),
    }
}

/// A response with a body of that type, after which the connection ends.
pub fn response(content_type: &str, body: &str) -> Vec<u8> {
    head("200 OK", content_type, "", body).into_bytes()
}

/// The response to a request that is refused.
pub fn refusal(refusal: Refusal) -> Vec<u8> {
    let allow = match refusal {
        Refusal::Method(method) => format!("Allow: {method}\r\n"),
        _ => String::new(),
    };
    let body = format!("{}\n", refusal.status());
    head(refusal.status(), "text/plain", &allow, &body).into_bytes()
}

fn head(status: &str, content_type: &str, more: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n{more}Connection: close\r\n\r\n{body}",
        body.len()
    )
}

/// The body of a whole response; `None` if it is none, or not a good one.
pub fn body_of_response(bytes: &[u8]) -> Option<&[u8]> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(start)) = response.parse(bytes) else { return None };
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"))?;
    let length: usize = std::str::from_utf8(length.value).ok()?.parse().ok()?;
    let body = bytes.get(start..)?;
    (response.code == Some(200) && body.len() == length).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Request {
        read_request(text.as_bytes())
    }

    #[test]
    fn the_three_requests_are_understood_and_nothing_else() {
        assert_eq!(read("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), Request::Whole(Route::Metrics));
        assert_eq!(read("GET /v1/status HTTP/1.0\r\n\r\n"), Request::Whole(Route::Status));
        assert_eq!(
            read("GET /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
            Request::Whole(Route::Metrics)
        );
        assert_eq!(
            read("POST /v1/upgrade HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
            Request::Whole(Route::Upgrade)
        );
        let refused = [
            ("GET / HTTP/1.1\r\n\r\n", Refusal::NotFound),
            ("GET /metrics?x=1 HTTP/1.1\r\n\r\n", Refusal::NotFound),
            ("GET /../metrics HTTP/1.1\r\n\r\n", Refusal::NotFound),
            ("POST /v1/status HTTP/1.1\r\n\r\n", Refusal::Method("GET")),
            ("GET /v1/upgrade HTTP/1.1\r\n\r\n", Refusal::Method("POST")),
            ("GET /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", Refusal::Bad),
            ("GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", Refusal::Bad),
            ("GET /metrics HTTP/2.0\r\n\r\n", Refusal::Bad),
            ("\x16\x03\x01\x02", Refusal::Bad),
            ("GET /metrics HTTP/1.1\r\nbad header\r\n\r\n", Refusal::Bad),
        ];
        for (text, why) in refused {
            assert_eq!(read(text), Request::Refused(why), "{text:?}");
        }
    }

    #[test]
    fn a_request_may_come_in_pieces_but_not_without_end() {
        let whole = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
        for len in 0..whole.len() {
            assert_eq!(read(&whole[..len]), Request::Incomplete, "{len} bytes");
        }
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "y".repeat(REQUEST_BYTES_MAX));
        assert_eq!(read(&long[..REQUEST_BYTES_MAX - 1]), Request::Incomplete);
        assert_eq!(read(&long), Request::Refused(Refusal::TooLarge));
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(HEADERS_MAX + 1));
        assert_eq!(read(&many), Request::Refused(Refusal::TooLarge));
    }

    #[test]
    fn a_response_is_read_back_whole_or_not_at_all() {
        let bytes = response("application/json", "{}\n");
        assert_eq!(body_of_response(&bytes), Some(&b"{}\n"[..]));
        for len in 0..bytes.len() {
            assert_eq!(body_of_response(&bytes[..len]), None, "{len} bytes");
        }
        assert_eq!(body_of_response(&refusal(Refusal::Busy)), None);
        assert!(String::from_utf8(refusal(Refusal::Method("GET"))).unwrap().contains("\r\nAllow: GET\r\n"));
    }
}
