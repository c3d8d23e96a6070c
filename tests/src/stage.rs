//! A test on a stage of its own: the libtest process starts the test again, alone, in new namespaces.

use std::any::type_name;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use vnetctl::sandbox::stage::{self, StageSpec};

use crate::{World, binaries, packages, process};

/// No test takes so many seconds; one that does is ended, with all that it started.
const LIMIT_SECS: u64 = 180;
/// Sets another limit, for what is made larger by hand.
const LIMIT: &str = "VNET_TEST_LIMIT_SECS";

/// Runs a test with the usual stage: host 203.0.113.1, internet 203.0.113.10 and 198.51.100.7, and a
/// `/etc/resolv.conf` of the host that names 203.0.113.10.
pub fn staged<T: Fn()>(test: T, what: impl FnOnce(&World)) {
    let spec = StageSpec {
        resolv_conf: Some("nameserver 203.0.113.10\n".to_owned()),
        ..StageSpec::default()
    };
    staged_with(test, &spec, what);
}

/// Runs a test on a stage of this kind.
///
/// # Panics
/// When the test does, and when the system lacks what it needs.
pub fn staged_with<T: Fn()>(_test: T, spec: &StageSpec, what: impl FnOnce(&World)) {
    if stage::inside() {
        // Whatever loses its parent becomes this process's child, so that nothing can hide.
        nix::sys::prctl::set_child_subreaper(true).expect("any process may reap");
        let limit =
            std::env::var(LIMIT).map_or(LIMIT_SECS, |secs| secs.parse().expect("a number of seconds"));
        thread::spawn(move || {
            thread::sleep(Duration::from_secs(limit));
            eprintln!("the test takes longer than {limit} s");
            process::kill_descendants();
            std::process::abort();
        });
        let stage = stage::Stage::build(spec).unwrap_or_else(|error| panic!("{error}"));
        return what(&World::new(stage));
    }
    packages::check();
    let name = name_of::<T>();
    let programs = binaries::binary("");
    let output = stage::command("/proc/self/exe")
        .args([name, "--exact", "--nocapture"])
        .env(binaries::DIRECTORY, programs)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| {
            panic!(
                "user namespaces are refused here ({error}); as root: sysctl kernel.unprivileged_userns_clone=1 \
                 kernel.apparmor_restrict_unprivileged_userns=0"
            )
        });
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success(),
        "{name} failed on its stage: {}",
        output.status
    );
    assert!(
        text.contains("1 passed"),
        "{name} is not the name of a test of this file"
    );
}

/// The test's name as libtest knows it: its path without the crate.
fn name_of<T>() -> &'static str {
    let path = type_name::<T>();
    path.split_once("::").map_or(path, |(_, name)| name)
}

/// Runs a test again as `nobody`, if it runs as root; true in the run that is to do the work.
///
/// # Panics
/// When that run fails.
pub fn as_ordinary_user<T: Fn()>(_test: &T) -> bool {
    if !nix::unistd::geteuid().is_root() || stage::inside() {
        return true;
    }
    packages::check();
    let name = name_of::<T>();
    // The build directory need not be open to others.
    let scratch = std::env::temp_dir().join(format!("vnet-ordinary-{}-{name}", std::process::id()));
    let copy = || -> std::io::Result<()> {
        fs::create_dir_all(&scratch)?;
        fs::copy("/proc/self/exe", scratch.join("tests"))?;
        for program in ["vnetctl", "vnet-controlplane", "vnet-dataplane"] {
            fs::copy(binaries::binary(program), scratch.join(program))?;
        }
        fs::set_permissions(&scratch, fs::Permissions::from_mode(0o755))
    };
    copy().expect("a test may write to the temporary directory");
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(scratch.join("tests"))
        .args([name, "--exact", "--nocapture"])
        .env(binaries::DIRECTORY, &scratch)
        .env_remove("XDG_RUNTIME_DIR")
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .expect("setpriv (package util-linux) runs the test as an ordinary user");
    let _ = fs::remove_dir_all(&scratch);
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success(),
        "{name} failed as an ordinary user: {}",
        output.status
    );
    assert!(
        text.contains("1 passed"),
        "{name} is not the name of a test of this file"
    );
    false
}
