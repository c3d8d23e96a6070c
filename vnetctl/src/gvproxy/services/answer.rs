//! What a request is answered: a status, a text, and what helps. The form is that of Go's `net/http`, which clients
//! of gvproxy know; what vnet has to add stands in a header, so that who compares texts finds the one that is expected.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};
use serde::Serialize;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::json;
use crate::client::NoAnswer;
use crate::failure::{Failure, describe};
use crate::output::text::safe;

/// A response's body.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// The header that says what helps, as one line of visible ASCII.
const REMEDY: HeaderName = HeaderName::from_static("x-vnet-remedy");
/// The header that says where something listens, if that is at less than was asked for.
const LISTEN: HeaderName = HeaderName::from_static("x-vnet-listen");
/// What a header says at most.
const REMEDY_BYTES_MAX: usize = 1024;
/// What an error's text says at most.
const TEXT_CHARS_MAX: usize = 2000;

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    status: StatusCode,
    content: Content,
    remedy: String,
    listen: String,
}

#[derive(Debug)]
enum Content {
    /// Nothing.
    Nothing,
    /// What went wrong.
    Error(String),
    /// JSON, of a type.
    Json(&'static str, String),
    /// Events without end.
    Events(Body),
}

impl Answer {
    /// It is done, and there is nothing to say.
    pub(super) fn done() -> Self {
        Self::new(StatusCode::OK, Content::Nothing)
    }

    /// A value, as gvproxy sends it: its type is left to a guess, which is plain text.
    pub(super) fn json(value: &impl Serialize) -> Self {
        let content = Content::Json("text/plain; charset=utf-8", json::write(value));
        Self::new(StatusCode::OK, content)
    }

    /// A value as the draft sends it, under its own type.
    pub(super) fn typed(value: &impl Serialize) -> Self {
        let content = Content::Json("application/json", json::write(value));
        Self::new(StatusCode::OK, content)
    }

    /// Server-sent events.
    pub(super) fn events(body: Body) -> Self {
        Self::new(StatusCode::OK, Content::Events(body))
    }

    /// Something is wrong, in one line.
    pub(super) fn error(status: StatusCode, text: impl Into<String>) -> Self {
        let text: String = safe(&text.into()).chars().take(TEXT_CHARS_MAX).collect();
        Self::new(status, Content::Error(text))
    }

    /// What was sent is wrong.
    pub(super) fn bad_request(text: impl Into<String>) -> Self {
        Self::error(StatusCode::BAD_REQUEST, text)
    }

    /// It was refused, as gvproxy refuses.
    pub(super) fn failed(text: impl Into<String>) -> Self {
        Self::error(StatusCode::INTERNAL_SERVER_ERROR, text)
    }

    /// It may not be asked for here.
    pub(super) fn forbidden(text: impl Into<String>) -> Self {
        Self::error(StatusCode::FORBIDDEN, text)
    }

    /// There is no such path.
    pub(super) fn no_path() -> Self {
        Self::error(StatusCode::NOT_FOUND, "404 page not found")
    }

    /// No controlplane answers.
    pub(super) fn unavailable(text: &str) -> Self {
        Self::lines(StatusCode::SERVICE_UNAVAILABLE, text)
    }

    /// The first line is what is wrong, the others are what helps.
    pub(super) fn lines(status: StatusCode, text: &str) -> Self {
        let mut lines = text.lines();
        let answer = Self::error(status, lines.next().unwrap_or_default());
        let rest: Vec<&str> = lines.map(str::trim).collect();
        answer.with_remedy(rest.join("; "))
    }

    /// Adds what helps.
    #[must_use]
    pub(super) fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// Adds where it listens.
    #[must_use]
    pub(super) fn with_listen(mut self, listen: impl Into<String>) -> Self {
        self.listen = listen.into();
        self
    }

    /// As it goes out.
    pub(super) fn into_response(self) -> Response<Body> {
        let (kind, body) = match self.content {
            Content::Nothing => (None, empty()),
            Content::Error(text) => (Some("text/plain; charset=utf-8"), full(format!("{text}\n"))),
            Content::Json(kind, text) => (Some(kind), full(text)),
            Content::Events(body) => (Some("text/event-stream"), body),
        };
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        if let Some(kind) = kind {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        }
        if kind == Some("text/event-stream") {
            headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        }
        if self.status.as_u16() >= 400 {
            let name = HeaderName::from_static("x-content-type-options");
            headers.insert(name, HeaderValue::from_static("nosniff"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(remedy) = header_value(&self.remedy) {
            headers.insert(REMEDY, remedy);
        }
        if let Some(listen) = header_value(&self.listen) {
            headers.insert(LISTEN, listen);
        }
        response
    }

    fn new(status: StatusCode, content: Content) -> Self {
        Self {
            status,
            content,
            remedy: String::new(),
            listen: String::new(),
        }
    }

    /// What it says.
    pub(super) fn text(&self) -> &str {
        match &self.content {
            Content::Error(text) | Content::Json(_, text) => text,
            Content::Nothing | Content::Events(_) => "",
        }
    }
}

/// No controlplane could be reached, or none could be started.
impl From<Failure> for Answer {
    fn from(failure: Failure) -> Self {
        Self::unavailable(&failure.to_string())
    }
}

/// What the controlplane refused.
impl From<tonic::Status> for Answer {
    fn from(status: tonic::Status) -> Self {
        if is_away(&status) {
            return Self::unavailable(&describe(&status));
        }
        let code = match status.code() {
            Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::AlreadyExists | Code::Aborted | Code::FailedPrecondition => StatusCode::CONFLICT,
            Code::PermissionDenied | Code::Unauthenticated => StatusCode::FORBIDDEN,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::lines(code, &describe(&status))
    }
}

/// The reason of a status of whom a person was asked for, and who did not answer.
pub(super) const UNANSWERED: &str = "UNANSWERED";

/// The constant word that says why, if a status has one.
pub(super) fn reason(status: &tonic::Status) -> Option<String> {
    let details = status.get_error_details();
    details.error_info().map(|info| info.reason.clone())
}

/// What is wrong with a place to listen, as a constant word, if a status says that.
pub(super) fn listen_problem(status: &tonic::Status) -> Option<String> {
    let details = status.get_error_details();
    details.error_info()?.metadata.get("listen_problem").cloned()
}

/// The place to listen that something is wrong with, if a status says that.
pub(super) fn listen_of(status: &tonic::Status) -> Option<String> {
    let details = status.get_error_details();
    details.error_info()?.metadata.get("listen").cloned()
}

/// Whether a status says that no controlplane or no dataplane answers, rather than what one answered.
pub(super) fn is_away(status: &tonic::Status) -> bool {
    let source = std::error::Error::source(status);
    if source.is_some_and(|source| source.is::<NoAnswer>()) {
        return true;
    }
    let refused = reason(status).is_some_and(|reason| reason == "DATAPLANE_REFUSED" || reason == UNANSWERED);
    !refused
        && matches!(
            status.code(),
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled
        )
}

/// A header's value: visible ASCII and spaces. Nothing where there is nothing to say.
fn header_value(text: &str) -> Option<HeaderValue> {
    let mut value = String::new();
    for c in text.chars() {
        match c {
            ' '..='~' => value.push(c),
            _ => value.push('?'),
        }
        if value.len() >= REMEDY_BYTES_MAX {
            break;
        }
    }
    if value.is_empty() {
        return None;
    }
    HeaderValue::from_str(&value).ok()
}

fn empty() -> Body {
    Empty::new().boxed_unsync()
}

fn full(text: String) -> Body {
    Full::new(Bytes::from(text)).boxed_unsync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_plain_stands_in_no_header() {
        let header = header_value("line\r\nSet-Cookie: x \u{fc}").unwrap();
        assert_eq!(header, "line??Set-Cookie: x ?");
        assert_eq!(header_value(""), None);
        assert_eq!(header_value(&"x".repeat(5000)).unwrap().len(), REMEDY_BYTES_MAX);
    }

    #[test]
    fn refusals_have_the_status_of_their_code_and_lines_below_the_first_are_remedies() {
        let cases = [
            (Code::InvalidArgument, 400),
            (Code::NotFound, 404),
            (Code::FailedPrecondition, 409),
            (Code::PermissionDenied, 403),
            (Code::Unavailable, 503),
            (Code::DeadlineExceeded, 503),
            (Code::ResourceExhausted, 500),
        ];
        for (code, expected) in cases {
            let answer = Answer::from(tonic::Status::new(code, "no"));
            assert_eq!(answer.status.as_u16(), expected, "{code}");
        }
        let mut details = tonic_types::ErrorDetails::new();
        details.add_bad_request_violation("listen", "is odd");
        let status = tonic::Status::with_error_details(Code::InvalidArgument, "not valid", details);
        let answer = Answer::from(status);
        assert_eq!(
            (answer.text(), answer.remedy.as_str()),
            ("not valid", "listen: is odd")
        );
    }
}
