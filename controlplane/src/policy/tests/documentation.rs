//! The policies that the documentation shows load, and come out as their own tests say.
//!
//! A block that begins with three backticks and `yaml` is a whole policy. One that is a part of a policy begins with
//! `yaml fragment`.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;

/// A whole policy of a page.
pub(super) struct Shown {
    pub(super) place: String,
    pub(super) document: String,
}

pub(super) fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let docs = fs::read_dir(root.join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut pages: Vec<PathBuf> = docs
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
        .collect();
    pages.push(root.join("README.md"));
    pages.sort();
    pages
}

pub(super) fn shown(page: &Path) -> Vec<Shown> {
    let text = fs::read_to_string(page).unwrap();
    let mut found = Vec::new();
    let mut block: Option<(String, usize, String)> = None;
    for (number, line) in text.lines().enumerate() {
        match (line.strip_prefix("```"), &mut block) {
            (Some(_), Some((language, first, document))) => {
                if language == "yaml" {
                    found.push(Shown {
                        place: format!("{}:{first}", page.file_name().unwrap().display()),
                        document: std::mem::take(document),
                    });
                }
                block = None;
            }
            (Some(language), None) => block = Some((language.trim().to_owned(), number + 2, String::new())),
            (None, Some((_, _, document))) => {
                document.push_str(line);
                document.push('\n');
            }
            (None, None) => {}
        }
    }
    assert!(block.is_none(), "{} ends within a block", page.display());
    found
}

/// The lists that a document names, as files of the form `hosts`, which all of ours are.
fn lists_of(document: &str) -> Attachments {
    let list = |path: String| {
        let content = b"0.0.0.0 a.malware.example\n".as_slice();
        let attachment = Attachment {
            digest: path.clone(),
            content: content.into(),
        };
        (path, attachment)
    };
    Attachments(list_paths(document).into_iter().map(list).collect())
}

#[test]
fn every_policy_that_the_documentation_shows_loads_and_passes_its_tests() {
    let all: Vec<Shown> = pages().iter().flat_map(|page| shown(page)).collect();
    let of = |page: &str| all.iter().filter(|shown| shown.place.starts_with(page)).count();
    assert!(
        of("README.md:") >= 1 && of("policy.md:") >= 2,
        "the blocks are found"
    );
    for Shown { place, document } in &all {
        let policy = Policy::parse_with(place, document, &lists_of(document), &ListCache::default())
            .unwrap_or_else(|errors| panic!("{errors}"));
        policy
            .run_tests(place, crate::clock::Now::BEFORE_ALL)
            .unwrap_or_else(|errors| panic!("{errors}"));
    }
}

#[test]
fn the_reference_claims_vms_and_tests_itself() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policy.md");
    let reference = &shown(&page)[0];
    let policy = Policy::parse_with(
        "policy.md",
        &reference.document,
        &lists_of(&reference.document),
        &ListCache::default(),
    );
    let policy = policy.unwrap_or_else(|errors| panic!("{errors}"));
    assert!(policy.probes() >= 3, "its tests test something");
    assert!(policy.applies_to.is_some() && policy.dns.is_some() && policy.versioned);
}
