//! The documents name what is there.

use std::fs;
use std::path::{Path, PathBuf};

/// Every file of Rust below.
fn sources(below: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn each_test_that_the_tables_name_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = Vec::new();
    for part in ["proto", "dataplane", "controlplane", "vnetctl", "tests"] {
        sources(&root.join(part), &mut found);
    }
    let code: String = found
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let tables = fs::read_to_string(root.join("docs/tests.md")).unwrap();
    let named: Vec<&str> = tables
        .split('`')
        // What stands between quotes.
        .skip(1)
        .step_by(2)
        .filter(|word| word.matches('_').count() >= 3 && !word.contains(['/', ' ', '-', '*']))
        .collect();
    assert!(named.len() > 300, "the tables are read: {}", named.len());
    let missing: Vec<_> = named
        .iter()
        .filter(|name| !code.contains(&format!("fn {name}(")))
        .collect();
    assert!(missing.is_empty(), "no such test: {missing:?}");
}
