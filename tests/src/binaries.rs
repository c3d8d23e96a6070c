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
    // What `cargo test` told this test of its own package is nothing to the programs, and build scripts that look
    // at it (ring's) would run again, and all that rests on them be compiled again, at each turn.
    let of_the_package = |name: &str| {
        ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
            || [
                "CARGO_CRATE_NAME",
                "CARGO_PRIMARY_PACKAGE",
                "CARGO_TARGET_TMPDIR",
                "OUT_DIR",
            ]
            .contains(&name)
    };
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(of_the_package) {
            cargo.env_remove(name);
        }
    }
    let built = cargo.output().expect("cargo builds the programs under test");
    assert!(
        built.status.success(),
        "the programs under test do not build:\n{}",
        String::from_utf8_lossy(&built.stderr)
    );
    directory
}
