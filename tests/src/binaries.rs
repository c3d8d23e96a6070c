//! The programs under test: where they are, built if they are not fresh.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Names a directory that has the programs; nothing is built then.
pub const DIRECTORY: &str = "VNET_TEST_BINARIES";

/// One of `vnetctl`, `vnet-controlplane` and `vnet-dataplane`.
///
/// # Panics
/// When they cannot be built.
pub fn binary(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let directory = BUILT.get_or_init(|| match std::env::var_os(DIRECTORY) {
        Some(directory) => PathBuf::from(directory),
        None => build(),
    });
    directory.join(name)
}

/// Builds them as this test was built. `--workspace`, so that no dependency is compiled again with
/// other features than `cargo test --workspace` has just used.
fn build() -> PathBuf {
    // TARGET/PROFILE/deps/TEST
    let own = std::env::current_exe().expect("a test knows its file");
    let directory = own
        .parent()
        .and_then(Path::parent)
        .expect("a test lies in deps")
        .to_owned();
    let profile = match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev".to_owned(),
        Some(other) => other.to_owned(),
        None => panic!("{} is no target directory", directory.display()),
    };
    let target = directory
        .parent()
        .expect("a profile's directory lies in the target's");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--quiet", "--workspace", "--bins", "--profile", &profile])
        .arg("--manifest-path")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"))
        .arg("--target-dir")
        .arg(target);
    let built = cargo.output().expect("cargo builds the programs under test");
    assert!(
        built.status.success(),
        "the programs under test do not build:\n{}",
        String::from_utf8_lossy(&built.stderr)
    );
    directory
}
