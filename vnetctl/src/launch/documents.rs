//! Policy documents and inline rules, checked with the controlplane's own loader before anything is
//! started or sent.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use vnet_controlplane::policy::{DOCUMENT_BYTES_MAX, OwnPolicy, PolicyErrors, PolicyWarning};
use vnet_proto::v1;

use crate::failure::Failure;
use crate::output::text::safe;

/// A policy document, and where it came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Document {
    /// Its text.
    pub text: String,
    /// Its path, for messages.
    pub source: String,
}

/// Reads a document from a file; `-` is standard input.
///
/// # Errors
/// When it cannot be read, is longer than a policy may be, or is not UTF-8.
pub fn read_document(path: &Path) -> Result<Document, Failure> {
    let (source, text) = if path == Path::new("-") {
        ("standard input".to_owned(), read_bounded(io::stdin()))
    } else {
        (
            path.display().to_string(),
            File::open(path).and_then(read_bounded),
        )
    };
    match text {
        Ok(text) => Ok(Document { text, source }),
        Err(error) => Err(Failure::Failed(format!(
            "cannot read policy {}: {error}",
            safe(&source)
        ))),
    }
}

fn read_bounded(file: impl Read) -> io::Result<String> {
    let mut text = String::new();
    file.take(DOCUMENT_BYTES_MAX as u64 + 1)
        .read_to_string(&mut text)?;
    if text.len() > DOCUMENT_BYTES_MAX {
        return Err(io::Error::other(format!(
            "it is longer than {DOCUMENT_BYTES_MAX} bytes, the most a policy may be"
        )));
    }
    Ok(text)
}

/// Checks a document whole.
///
/// # Errors
/// Everything that is wrong with it, a line each.
pub fn check_document(document: &Document) -> Result<Vec<v1::PolicyWarning>, Failure> {
    if document.text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let own = OwnPolicy::parse(&document.source, &document.text, &[]).map_err(|e| refused(&e))?;
    Ok(warnings(&own))
}

/// Checks what a VM brings along: a document, if there is one, and rules before it.
///
/// # Errors
/// Everything that is wrong with either, a line each.
pub fn check_own(document: Option<&Document>, rules: &[String]) -> Result<Vec<v1::PolicyWarning>, Failure> {
    let (source, text) = document.map_or(("", ""), |d| (d.source.as_str(), d.text.as_str()));
    let own = OwnPolicy::parse(source, text, rules).map_err(|e| refused(&e))?;
    Ok(warnings(&own))
}

/// Warnings as lines for people.
pub fn warning_lines(source: &str, warnings: &[v1::PolicyWarning]) -> Vec<String> {
    let line = |w: &v1::PolicyWarning| format!("warning: {source}:{}:{}: {}", w.line, w.column, w.text);
    warnings.iter().map(|w| safe(&line(w)).into_owned()).collect()
}

fn warnings(own: &OwnPolicy) -> Vec<v1::PolicyWarning> {
    let message = |w: &PolicyWarning| v1::PolicyWarning {
        line: w.line,
        column: w.column,
        text: w.text.clone(),
    };
    own.document()
        .map_or_else(Vec::new, |policy| policy.warnings.iter().map(message).collect())
}

fn refused(errors: &PolicyErrors) -> Failure {
    let problem = |e: &vnet_controlplane::policy::PolicyError| {
        // A rule of the command line has no file to point into.
        let inline = e.source_name.starts_with("--") || e.source_name == "rule";
        let text = if inline {
            format!("{}: {}", e.source_name, e.text)
        } else {
            e.to_string()
        };
        text.lines()
            .map(|line| safe(line).into_owned())
            .collect::<Vec<_>>()
            .join("\n  ")
    };
    Failure::Failed(errors.0.iter().map(problem).collect::<Vec<_>>().join("\n  "))
}
