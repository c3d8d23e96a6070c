//! How a command ends when it does not succeed: what is said, and with which exit code.
//!
//! Exit codes: 0 done, 1 refused or failed, 2 usage, 3 `policy diff` found differences. `run` exits with its command's
//! status, and with 125, 126 and 127 for its own failures as `env` does. What a server answers is turned here into one
//! message that names the field and the remedy (`google.rpc` error details, AIP-193).

use std::fmt::Write as _;
use std::io;

use tonic_types::StatusExt as _;

use crate::client::NoAnswer;
use crate::launch::WithCauses;
use crate::output::text::safe;

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// What was typed makes no sense.
    #[error("{0}")]
    Usage(String),
    /// It was refused, or did not work.
    #[error("{0}")]
    Failed(String),
    /// `run` itself failed before its command could start.
    #[error("{0}")]
    Run(String),
    /// `run` found its command but could not execute it.
    #[error("{0}")]
    NotExecutable(String),
    /// `run` did not find its command.
    #[error("{0}")]
    NotFound(String),
    /// Everything has been said; only the code is left.
    #[error("exit code {0}")]
    Code(u8),
    /// Whoever read the output has gone away, as `head` does. Nothing is wrong.
    #[error("the output was closed")]
    OutputClosed,
}

/// An error and its causes, in one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    WithCauses(error).to_string()
}

/// What helps where the system does not let a file be made or written; nothing where it is not the system's error.
pub fn how_to_write(error: &io::Error) -> &'static str {
    if error.raw_os_error().is_none() {
        return "";
    }
    match error.kind() {
        io::ErrorKind::NotFound => " (make its directory, or write elsewhere)",
        io::ErrorKind::NotADirectory => " (a file stands where its directory should; write elsewhere)",
        io::ErrorKind::IsADirectory => " (name a file)",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => " (write where this user may)",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => " (make room, or write elsewhere)",
        _ => "",
    }
}

/// What helps where the system does not let a file be read; nothing where it is not the system's error.
pub fn how_to_read(error: &io::Error) -> &'static str {
    if error.raw_os_error().is_none() {
        return "";
    }
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => " (name one that is there)",
        io::ErrorKind::IsADirectory => " (name a file)",
        io::ErrorKind::PermissionDenied => " (let this user read it, or name another)",
        _ => "",
    }
}

impl Failure {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => EXIT_USAGE,
            Self::Failed(_) => EXIT_FAILED,
            Self::Run(_) => EXIT_RUN_FAILED,
            Self::NotExecutable(_) => EXIT_NOT_EXECUTABLE,
            Self::NotFound(_) => EXIT_NOT_FOUND,
            Self::Code(code) => *code,
            Self::OutputClosed => 0,
        }
    }

    /// What to print on stderr; nothing when all has been said.
    pub fn message(&self) -> Option<String> {
        match self {
            Self::Code(_) | Self::OutputClosed => None,
            other => Some(format!("error: {other}")),
        }
    }

    /// The same failure as one of `run` itself.
    #[must_use]
    pub fn in_run(self) -> Self {
        match self {
            Self::Usage(text) | Self::Failed(text) => Self::Run(text),
            Self::OutputClosed => Self::Code(EXIT_RUN_FAILED),
            other => other,
        }
    }
}

/// A failure to write to stdout; a reader that went away is not one.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::OutputClosed
        } else {
            Self::Failed(format!("cannot write the output: {error}"))
        }
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        Self::Failed(describe(&status))
    }
}

/// Everything a refusal says: its sentence, each field or condition, and what helps.
pub fn describe(status: &tonic::Status) -> String {
    let source = std::error::Error::source(status);
    if let Some(none) = source.and_then(|source| source.downcast_ref::<NoAnswer>()) {
        return none.whole();
    }
    let details = status.get_error_details();
    let mut text = safe(status.message()).into_owned();
    if text.is_empty() {
        text = match status.code() {
            tonic::Code::Unavailable => "the controlplane went away".to_owned(),
            code => format!("the controlplane answered {code}"),
        };
    }
    if status.code() == tonic::Code::DeadlineExceeded && status.details().is_empty() {
        text = "the controlplane did not answer in time".to_owned();
    }
    if status.code() == tonic::Code::Unimplemented && details.help().is_none() {
        text = format!("{text} (this controlplane does not serve it)");
    }
    for violation in details.bad_request().map_or(&[][..], |b| &b.field_violations) {
        line(&mut text, &violation.field, &violation.description);
    }
    for violation in details.precondition_failure().map_or(&[][..], |p| &p.violations) {
        line(&mut text, &violation.subject, &violation.description);
    }
    for violation in details.quota_failure().map_or(&[][..], |q| &q.violations) {
        line(&mut text, &violation.subject, &violation.description);
    }
    for link in details.help().map_or(&[][..], |h| &h.links) {
        line(&mut text, "", &link.description);
    }
    if let Some(remedy) = details.error_info().and_then(|info| info.metadata.get("remedy")) {
        line(&mut text, "", remedy);
    }
    text
}

/// Adds one indented line, unless the text says it already.
fn line(text: &mut String, what: &str, description: &str) {
    if description.is_empty() || text.contains(&*safe(description)) {
        return;
    }
    let what = if what.is_empty() {
        String::new()
    } else {
        format!("{}: ", safe(what))
    };
    // A description may have several lines, as a policy's problem with its excerpt has.
    let mut lines = description.lines();
    let _ = write!(text, "\n  {what}{}", safe(lines.next().unwrap_or_default()));
    for more in lines {
        let _ = write!(text, "\n  {}", safe(more));
    }
}

pub(crate) const EXIT_FAILED: u8 = 1;
/// A usage error.
pub const EXIT_USAGE: u8 = 2;
/// `policy diff` found something that would be decided otherwise.
pub const EXIT_DIFFERS: u8 = 3;
/// `run` itself failed.
pub const EXIT_RUN_FAILED: u8 = 125;
const EXIT_NOT_EXECUTABLE: u8 = 126;
const EXIT_NOT_FOUND: u8 = 127;

#[cfg(test)]
mod tests {
    use tonic::{Code, Status};
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    #[test]
    fn refusal_names_each_field_and_the_remedy() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation(
            "target.address.prefix",
            "10.0.0.1/8 has bits set (did you mean 10.0.0.0/8?)",
        );
        details.add_help_link("see vnetctl allow --help", "");
        let status = Status::with_error_details(Code::InvalidArgument, "the grant is not valid", details);

        let text = describe(&status);

        assert_eq!(
            text,
            "the grant is not valid\n  target.address.prefix: 10.0.0.1/8 has bits set (did you mean 10.0.0.0/8?)\
             \n  see vnetctl allow --help"
        );
    }

    #[test]
    fn what_a_server_says_cannot_move_the_cursor() {
        let text = describe(&Status::failed_precondition("no \u{1b}[2J such vm"));

        assert_eq!(text, "no \\u{1b}[2J such vm");
    }

    #[test]
    fn exit_codes_have_one_meaning_each() {
        let text = || "x".to_owned();
        let codes = [
            (Failure::Failed(text()), 1),
            (Failure::Usage(text()), 2),
            (Failure::Usage(text()).in_run(), 125),
            (Failure::Failed(text()).in_run(), 125),
            (Failure::NotExecutable(text()).in_run(), 126),
            (Failure::NotFound(text()).in_run(), 127),
            (Failure::OutputClosed, 0),
            (Failure::Code(42), 42),
        ];

        for (failure, code) in codes {
            assert_eq!(failure.exit_code(), code, "{failure:?}");
        }
    }
}
