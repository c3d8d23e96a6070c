//! Why a request is refused: what the hub says, and the gRPC status with `google.rpc` details that a
//! client gets.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};
use vnet_proto::model::Malformed;
use vnet_proto::v1;

use crate::approval::{AnswerError, FindError};
use crate::grant::GrantError;
use crate::lists::ListError;
use crate::policy::PolicyErrors;
use crate::store::StoreError;

/// The domain of `google.rpc.ErrorInfo`.
const DOMAIN: &str = "vnet.v1";

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// What was given fits several things, or none where one is needed.
    #[error("{0}")]
    Ambiguous(String),
    /// A field is wrong.
    #[error("{field}: {text}")]
    Field {
        /// Which.
        field: String,
        /// What was found, and what was expected.
        text: String,
    },
    /// A policy document is wrong, in all of these places.
    #[error("{0}")]
    Document(PolicyErrors),
    /// It changed since it was read.
    #[error("{0}")]
    Changed(String),
    /// It is there already.
    #[error("{0}")]
    Exists(String),
    /// The state of things does not allow it.
    #[error("{text}")]
    Precondition {
        /// A constant word, as `OVERRULED`.
        reason: &'static str,
        /// One sentence.
        text: String,
    },
    /// A limit is reached.
    #[error("{0}")]
    Limit(String),
    /// The dataplane is not there, or does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// The dataplane refused, with a gRPC code of its own.
    #[error("{text}")]
    Dataplane {
        /// The code.
        code: u32,
        /// One sentence.
        text: String,
        /// Of a forward: what is wrong where it was to listen.
        listen: Option<ListenError>,
    },
    /// What the VM is under does not allow it.
    #[error("{0}")]
    Denied(String),
    /// A person was asked, and did not answer in time.
    #[error("{0}")]
    Unanswered(String),
    /// As many wait for a person as may.
    #[error("{0}")]
    Waiting(String),
    /// It is served, and not here.
    #[error("{0}")]
    Elsewhere(String),
    /// It holds now, and may not after a restart.
    #[error("{0}")]
    NotSaved(String),
    /// The store cannot be read.
    #[error("{0}")]
    Store(String),
}

/// What a dataplane says is wrong with a place to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenError {
    /// What.
    pub problem: v1::ListenProblem,
    /// Where.
    pub listen: String,
    /// Another forward of the same network has it.
    pub by_own_forward: bool,
}

impl ListenError {
    /// The problem's word, as `IN_USE`.
    fn word(&self) -> &'static str {
        let name = self.problem.as_str_name();
        name.strip_prefix("LISTEN_PROBLEM_").unwrap_or(name)
    }
}

/// What a dataplane refused. A problem that is not known is none.
impl From<v1::CommandError> for Refusal {
    fn from(error: v1::CommandError) -> Self {
        let listen = error.listen_error.and_then(|listen| {
            let problem = v1::ListenProblem::try_from(listen.problem).ok()?;
            (problem != v1::ListenProblem::Unspecified).then_some(ListenError {
                problem,
                listen: listen.listen,
                by_own_forward: listen.by_own_forward,
            })
        });
        Self::Dataplane {
            code: error.code,
            text: error.text,
            listen,
        }
    }
}

impl Refusal {
    /// A wrong field.
    pub fn field(field: impl Into<String>, text: impl Into<String>) -> Self {
        Self::Field {
            field: field.into(),
            text: text.into(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::Ambiguous(_) | Self::Field { .. } | Self::Document(_) => Code::InvalidArgument,
            Self::Changed(_) => Code::Aborted,
            Self::Exists(_) => Code::AlreadyExists,
            Self::Precondition { .. } => Code::FailedPrecondition,
            Self::Limit(_) | Self::Waiting(_) => Code::ResourceExhausted,
            Self::Unavailable(_) => Code::Unavailable,
            Self::Dataplane { code, .. } => match Code::from(i32::try_from(*code).unwrap_or(2)) {
                Code::Ok => Code::Unknown,
                code => code,
            },
            Self::Denied(_) => Code::PermissionDenied,
            Self::Unanswered(_) => Code::DeadlineExceeded,
            Self::Elsewhere(_) => Code::Unimplemented,
            Self::NotSaved(_) | Self::Store(_) => Code::Internal,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "NOT_FOUND",
            Self::Ambiguous(_) => "AMBIGUOUS",
            Self::Field { .. } => "INVALID_FIELD",
            Self::Document(_) => "INVALID_POLICY",
            Self::Changed(_) => "CHANGED",
            Self::Exists(_) => "EXISTS",
            Self::Precondition { reason, .. } => reason,
            Self::Limit(_) => "LIMIT_REACHED",
            Self::Unavailable(_) => "DATAPLANE_UNAVAILABLE",
            Self::Dataplane { .. } => "DATAPLANE_REFUSED",
            Self::Denied(_) => "DENIED",
            Self::Unanswered(_) => "UNANSWERED",
            Self::Waiting(_) => "TOO_MANY_WAIT",
            Self::Elsewhere(_) => "SERVED_ELSEWHERE",
            Self::NotSaved(_) => "NOT_SAVED",
            Self::Store(_) => "STORE_FAILED",
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        let mut metadata = HashMap::from([("text".to_owned(), text.clone())]);
        if let Refusal::Dataplane {
            listen: Some(error), ..
        } = &refusal
        {
            metadata.insert("listen_problem".to_owned(), error.word().to_owned());
            metadata.insert("listen".to_owned(), error.listen.clone());
        }
        let mut details = ErrorDetails::with_error_info(refusal.reason(), DOMAIN, metadata);
        match &refusal {
            Refusal::Field { field, text } => {
                details.add_bad_request_violation(field, text);
            }
            Refusal::Document(errors) => {
                let violations: Vec<FieldViolation> = errors
                    .0
                    .iter()
                    .map(|e| {
                        let at = format!("{}:{}:{}", e.source_name, e.line, e.column);
                        FieldViolation::new(
                            format!("document:{}:{}", e.line, e.column),
                            format!("{at}: {}", e.text),
                        )
                    })
                    .collect();
                details.set_bad_request(violations);
            }
            Refusal::Precondition { reason, text } => {
                details.add_precondition_failure_violation(*reason, "", text);
            }
            _ => {}
        }
        Status::with_error_details(refusal.code(), text, details)
    }
}

impl From<ListError> for Refusal {
    fn from(error: ListError) -> Self {
        let text = error.to_string();
        match error {
            ListError::TooLong | ListError::PackedTooLong(_) => Self::Limit(text),
            ListError::Twice(_)
            | ListError::Packing(_)
            | ListError::Digest { .. }
            | ListError::Read { .. }
            | ListError::NotAFile(_) => Self::field("lists", text),
        }
    }
}

impl From<FindError> for Refusal {
    fn from(error: FindError) -> Self {
        let text = error.to_string();
        match error {
            FindError::Short(_) => Self::field("id", text),
            FindError::NotFound(_) => Self::NotFound(text),
            FindError::Ambiguous { .. } | FindError::Forgotten(_) => Self::Ambiguous(text),
        }
    }
}

impl From<AnswerError> for Refusal {
    fn from(error: AnswerError) -> Self {
        let text = error.to_string();
        match error {
            AnswerError::Find(error) => error.into(),
            AnswerError::NotOpen { .. } => Self::Precondition {
                reason: "NOT_OPEN",
                text,
            },
            AnswerError::Changed { .. } => Self::Changed(text),
            AnswerError::Scope { .. } => Self::field("scope", text),
            AnswerError::NotALookup { .. } => Self::field("lookup_only", text),
        }
    }
}

impl From<GrantError> for Refusal {
    fn from(error: GrantError) -> Self {
        let text = error.to_string();
        match error {
            GrantError::Full => Self::Limit(text),
            GrantError::Exists(_) => Self::Exists(text),
            GrantError::Short(_) => Self::field("id", text),
            GrantError::NotFound(_) => Self::NotFound(text),
            GrantError::Ambiguous { .. } => Self::Ambiguous(text),
        }
    }
}

impl From<Malformed> for Refusal {
    fn from(error: Malformed) -> Self {
        let field = match &error {
            Malformed::Missing { field }
            | Malformed::Enum { field, .. }
            | Malformed::AddressLength { field, .. }
            | Malformed::MixedFamilies { field }
            | Malformed::Ports { field, .. }
            | Malformed::Range { field, .. }
            | Malformed::Name { field, .. }
            | Malformed::Text { field, .. }
            | Malformed::Mismatch { field } => field,
            Malformed::Prefix { .. } => "prefix",
            Malformed::WideNameMatch { .. } => "match",
        };
        let cause = std::error::Error::source(&error)
            .map(|e| format!(": {e}"))
            .unwrap_or_default();
        Self::field(field, format!("{error}{cause}"))
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Store(error.to_string())
    }
}
