//! Policy documents and inline rules, checked with the controlplane's own loader before anything is
//! started or sent.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use vnet_controlplane::clock::Clock;
use vnet_controlplane::lists;
use vnet_controlplane::policy::{
    DOCUMENT_BYTES_MAX, ListCache, OwnPolicy, Policy, PolicyErrors, PolicyWarning,
};
use vnet_proto::v1;

use crate::failure::{Failure, how_to_read};
use crate::output::text::safe;

/// A policy document, and where it came from.
#[derive(Debug, Clone, PartialEq)]
// Outside of tests there is no document of nothing.
#[cfg_attr(test, derive(Default))]
pub struct Document {
    /// Its text.
    pub text: String,
    /// Its path, for messages.
    pub source: String,
    /// The lists that it names, packed.
    pub lists: Vec<v1::PolicyList>,
}

/// Reads a document from a file, and the lists that it names from theirs, relative to it; `-` is standard
/// input, with lists relative to the working directory. The controlplane opens none of them.
///
/// # Errors
/// When one cannot be read, the document is empty, longer than a policy may be, or not UTF-8.
pub fn read_document(path: &Path) -> Result<Document, Failure> {
    let (source, text) = if path == Path::new("-") {
        ("standard input".to_owned(), read_bounded(io::stdin()))
    } else {
        (
            path.display().to_string(),
            File::open(path).and_then(read_bounded),
        )
    };
    let text = text.map_err(|error| {
        let remedy = how_to_read(&error);
        Failure::Failed(format!("cannot read policy {}: {error}{remedy}", safe(&source)))
    })?;
    document(source, text, path.parent().unwrap_or(Path::new("")))
}

/// A document whose text is there already, with the lists that it names, read from their files relative to `beside`.
///
/// # Errors
/// When a list cannot be read, or the document is empty.
pub fn document(source: String, text: String, beside: &Path) -> Result<Document, Failure> {
    // A file that was cut short, or a variable that was not set, must not be the same as no policy.
    if text.trim().is_empty() {
        let text = format!("{source}: the document is empty (expected at least defaultAction: deny)");
        return Err(Failure::Failed(safe(&text).into_owned()));
    }
    let lists = lists::read(&text, beside).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        let text = format!("{source}: {error}{}", cause.unwrap_or_default());
        Failure::Failed(safe(&text).into_owned())
    })?;
    Ok(Document { text, source, lists })
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
    Ok(warnings(&own_policy(Some(document), &[])?))
}

/// Runs a document's own tests, and gives how many destinations they name.
///
/// # Errors
/// Everything that is wrong with the document, or each test that fails.
pub fn test_document(document: &Document) -> Result<usize, Failure> {
    let own = own_policy(Some(document), &[])?;
    Ok(own.document().map_or(0, Policy::probes))
}

/// The JSON Schema of policy files.
pub fn policy_schema() -> String {
    vnet_controlplane::policy::schema()
}

/// Checks what a VM brings along: a document, if there is one, and rules before it.
///
/// # Errors
/// Everything that is wrong with either, a line each.
pub fn check_own(document: Option<&Document>, rules: &[String]) -> Result<Vec<v1::PolicyWarning>, Failure> {
    Ok(warnings(&own_policy(document, rules)?))
}

fn own_policy(document: Option<&Document>, rules: &[String]) -> Result<OwnPolicy, Failure> {
    let source = document.map_or("", |document| &document.source);
    let lists = document.map_or(&[][..], |document| &document.lists);
    let lists = lists::unpack(lists).map_err(|e| Failure::Failed(safe(&e.to_string()).into_owned()))?;
    let text = document.map(|document| document.text.as_str());
    let own = OwnPolicy::parse_with(source, text, rules, &lists, &ListCache::default());
    let own = own.map_err(|e| refused(&e))?;
    if let Some(policy) = own.document() {
        policy
            .run_tests(source, Clock::system().now())
            .map_err(|e| refused(&e))?;
    }
    Ok(own)
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
    let Some(policy) = own.document() else {
        return Vec::new();
    };
    let over = policy.over_by(Clock::system().now());
    policy.warnings.iter().chain(&over).map(message).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of this content, gone with the value.
    struct Written(std::path::PathBuf);

    impl Written {
        fn new(name: &str, text: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vnetctl-{name}-{}.yaml", std::process::id()));
            std::fs::write(&path, text).unwrap();
            Self(path)
        }
    }

    impl Drop for Written {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    const EMPTY: &str = "the document is empty (expected at least defaultAction: deny)";

    #[test]
    fn a_file_of_nothing_is_named_and_is_not_no_policy() {
        let blank = Written::new("blank", " \n\n");
        for path in [&blank.0, Path::new("/dev/null")] {
            let refused = read_document(path).unwrap_err().to_string();

            assert!(refused.starts_with(&path.display().to_string()), "{refused}");
            assert!(refused.ends_with(EMPTY), "{refused}");
        }
    }

    #[test]
    fn a_file_of_comments_alone_fails_its_check_as_one_of_nothing_does() {
        let comments = Written::new("comments", "# defaultAction: deny\n");
        let document = read_document(&comments.0).unwrap();

        let checked = check_document(&document).unwrap_err().to_string();
        let tested = test_document(&document).unwrap_err().to_string();
        let brought = check_own(Some(&document), &["allow tcp 192.0.2.7:80".to_owned()]).unwrap_err();

        assert!(
            checked.contains("comments") && checked.ends_with(EMPTY),
            "{checked}"
        );
        assert_eq!(tested, checked);
        assert_eq!(brought.to_string(), checked);
    }

    #[test]
    fn nothing_given_is_nothing_wrong() {
        assert_eq!(check_own(None, &[]).unwrap(), []);
    }
}
