//! Answers to requests that are not served, as Go's net/http writes its own.

use std::borrow::Cow;
use std::time::SystemTime;

use crate::metrics::RequestRefusal;

/// An answer, behind which the connection is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// Status code and words.
    pub(super) status: &'static str,
    /// One line.
    pub(super) text: Cow<'static, str>,
    /// What it is counted as.
    pub(super) cause: RequestRefusal,
    /// Whether the text follows; behind `HEAD` only its length is told.
    pub(super) has_body: bool,
}

impl Answer {
    pub(super) const NOT_FOUND: Self =
        Self::fixed("404 Not Found", "404 page not found", RequestRefusal::NotFound);
    pub(super) const NO_HTTP: Self =
        Self::fixed("400 Bad Request", "400 Bad Request", RequestRefusal::Malformed);
    pub(super) const NO_HOST: Self = Self::fixed(
        "400 Bad Request",
        "400 Bad Request: missing required Host header",
        RequestRefusal::Malformed,
    );
    pub(super) const HOSTS: Self = Self::fixed(
        "400 Bad Request",
        "400 Bad Request: too many Host headers",
        RequestRefusal::Malformed,
    );
    pub(super) const BROKEN_OFF: Self = Self::fixed(
        "400 Bad Request",
        "400 Bad Request: the request broke off",
        RequestRefusal::Malformed,
    );
    pub(super) const VERSION: Self = Self::fixed(
        "505 HTTP Version Not Supported",
        "505 HTTP Version Not Supported: only HTTP/1.0 and HTTP/1.1 are spoken here",
        RequestRefusal::Malformed,
    );
    pub(super) const BROWSER: Self = Self::fixed(
        "403 Forbidden",
        "a page in a browser may neither connect to the network nor open tunnels",
        RequestRefusal::Browser,
    );
    pub(super) const POLICY: Self = Self::fixed(
        "403 Forbidden",
        "a policy or mode is in force, so no tunnel on a socket that a VM can reach: use a forward, or -services",
        RequestRefusal::Policy,
    );
    pub(super) const TOO_LONG: Self = Self::fixed(
        "431 Request Header Fields Too Large",
        "431 Request Header Fields Too Large: the request's head is longer than 32768 bytes or 100 headers",
        RequestRefusal::TooLong,
    );
    pub(super) const TOO_SLOW: Self = Self::fixed(
        "408 Request Timeout",
        "408 Request Timeout: the request was not whole after 10 s",
        RequestRefusal::TooSlow,
    );
    pub(super) const CROWDED: Self = Self::fixed(
        "503 Service Unavailable",
        "too many connections wait with half a request; of all, this one had waited longest",
        RequestRefusal::Crowded,
    );

    const fn fixed(status: &'static str, text: &'static str, cause: RequestRefusal) -> Self {
        Self {
            status,
            text: Cow::Borrowed(text),
            cause,
            has_body: true,
        }
    }

    /// What the peer says of wrong parameters.
    pub(super) fn parameters(text: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status: "500 Internal Server Error",
            text: text.into(),
            cause: RequestRefusal::Tunnel,
            has_body: true,
        }
    }

    /// Its bytes.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let Self { status, text, .. } = self;
        let date = httpdate::fmt_http_date(SystemTime::now());
        let length = text.len() + 1;
        let mut answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n\
             Date: {date}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        if self.has_body {
            answer.push_str(text);
            answer.push('\n');
        }
        answer.into_bytes()
    }
}
