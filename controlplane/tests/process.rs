//! The controlplane as a process: starts, locks, signals, idleness and exit codes.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A directory of a test's own, and the controlplanes that it starts there.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vnet-p{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    fn start(&self, args: &[&str]) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vnet-controlplane"));
        command
            .args(["--listen", &format!("unix://{}", self.socket().display())])
            .args(args)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        Running(command.spawn().unwrap(), String::new())
    }
}

/// Root is not the user that a service runs as, and may not be looked at by it.
#[cfg(target_os = "linux")]
#[test]
fn root_may_speak_to_another_users_controlplane() {
    use std::os::unix::process::CommandExt as _;

    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can be root, and start another user's process");
        return;
    }
    let place = Place::new("root");
    // Where that user may go: the program may lie below somebody's home.
    let program = place.0.join("vnet-controlplane");
    std::fs::copy(env!("CARGO_BIN_EXE_vnet-controlplane"), &program).unwrap();
    std::os::unix::fs::chown(&place.0, Some(SERVICE_UID), Some(SERVICE_UID)).unwrap();
    let mut command = Command::new(program);
    command
        .args(["--listen", &format!("unix://{}", place.socket().display())])
        .args(["--store", "memory:"])
        .current_dir("/")
        .uid(SERVICE_UID)
        .gid(SERVICE_UID)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let running = Running(command.spawn().unwrap(), String::new());
    wait_for("the socket", || answers(&place.socket()));
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(place.socket()).unwrap()),
        SERVICE_UID
    );
    assert!(lists_vms(&place.socket()), "root is served");
    drop(running);
}

/// Whether the controlplane serves this process.
#[cfg(target_os = "linux")]
fn lists_vms(socket: &Path) -> bool {
    use hyper_util::rt::TokioIo;
    use vnet_proto::v1;
    use vnet_proto::v1::vm_service_client::VmServiceClient;

    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { std::io::Result::Ok(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let endpoint = tonic::transport::Endpoint::from_static("http://controlplane");
        let Ok(channel) = endpoint.connect_with_connector(connector).await else {
            return false;
        };
        let mut vms = VmServiceClient::new(channel);
        vms.list_vms(v1::ListVmsRequest::default()).await.is_ok()
    })
}

/// A user who need not exist.
#[cfg(target_os = "linux")]
const SERVICE_UID: u32 = 54_321;

/// A log that a full disk is behind.
#[cfg(target_os = "linux")]
#[test]
fn a_log_that_cannot_be_written_stops_nothing() {
    let place = Place::new("full");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vnet-controlplane"));
    command
        .args(["--listen", &format!("unix://{}", place.socket().display())])
        .args(["--store", "memory:", "--log-level", "trace"])
        .stdin(Stdio::null())
        .stderr(full);
    let mut running = Running(command.spawn().unwrap(), String::new());
    wait_for("the socket", || answers(&place.socket()));
    running.signal(Signal::SIGTERM);
    wait_for("the process to end", || running.ended().is_some());
    assert_eq!(running.ended().unwrap().code(), Some(0));
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A controlplane, and what it has said so far.
struct Running(Child, String);

impl Running {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().unwrap()
    }

    /// Reads on until it has said something so often.
    fn says(&mut self, words: &str, times: usize) {
        let mut piece = [0; 4096];
        while self.1.matches(words).count() < times {
            let length = std::io::Read::read(self.0.stderr.as_mut().unwrap(), &mut piece).unwrap();
            assert_ne!(length, 0, "it ended without {words:?}: {}", self.1);
            self.1.push_str(&String::from_utf8_lossy(&piece[..length]));
        }
    }

    fn wait(mut self) -> (i32, String) {
        wait_for("the process to end", || self.ended().is_some());
        let mut text = std::mem::take(&mut self.1);
        std::io::Read::read_to_string(&mut self.0.stderr.take().unwrap(), &mut text).unwrap();
        (self.ended().unwrap().code().unwrap_or(-1), text)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for(what: &str, mut is: impl FnMut() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while !is() {
        assert!(Instant::now() < give_up, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn answers(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

#[test]
fn two_first_starts_at_once_end_with_one_that_serves() {
    let place = Place::new("two");
    let args = ["--store", "memory:", "--if-absent"];
    let mut both = [place.start(&args), place.start(&args)];
    wait_for("one to give way", || {
        both.iter_mut().any(|one| one.ended().is_some())
    });
    wait_for("the other to serve", || answers(&place.socket()));
    let ended: Vec<bool> = both
        .iter_mut()
        .map(|one| one.ended().is_some_and(|s| s.success()))
        .collect();
    assert_eq!(ended.iter().filter(|ended| **ended).count(), 1, "{ended:?}");
    for one in &mut both {
        if one.ended().is_none() {
            one.signal(Signal::SIGTERM);
        }
    }
    wait_for("the other to end", || {
        both.iter_mut().all(|one| one.ended().is_some())
    });
    assert_eq!(
        std::fs::read_dir(&place.0).unwrap().count(),
        0,
        "no socket and no lock is left"
    );
}

#[test]
fn a_second_one_is_told_so_unless_absence_was_asked_for() {
    let place = Place::new("second");
    let _first = place.start(&["--store", "memory:"]);
    wait_for("the first to serve", || answers(&place.socket()));
    let mode = std::fs::metadata(place.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (code, text) = place.start(&["--store", "memory:"]).wait();
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("already serves"), "{text}");
    assert_eq!(place.start(&["--store", "memory:", "--if-absent"]).wait().0, 0);
}

#[test]
fn one_that_was_killed_leaves_nothing_in_the_way_and_keeps_its_policy() {
    let place = Place::new("killed");
    let store = format!("sqlite:{}", place.0.join("s.db").display());
    let file = place.0.join("p.yaml");
    std::fs::write(&file, "defaultAction: deny\n").unwrap();
    let policy = [
        "--store",
        store.as_str(),
        "--network-policy",
        file.to_str().unwrap(),
    ];
    let mut first = place.start(&policy);
    wait_for("the first to serve", || answers(&place.socket()));
    // Another socket, the same store.
    let other = Place::new("killed2");
    let (code, text) = other.start(&["--store", &store]).wait();
    assert_eq!(code, 1);
    assert!(text.contains("in use by another controlplane"), "{text}");
    first.signal(Signal::SIGKILL);
    wait_for("the first to die", || first.ended().is_some());
    let second = place.start(&["--store", &store]);
    wait_for("the second to serve", || answers(&place.socket()));
    second.signal(Signal::SIGINT);
    assert_eq!(second.wait().0, 0);
    assert!(!place.socket().exists());
}

#[test]
fn nothing_attached_ends_it_when_it_is_told_so() {
    let place = Place::new("idle");
    let mut running = place.start(&["--store", "memory:", "--idle-exit", "1"]);
    wait_for("it to serve", || answers(&place.socket()));
    let attached = UnixStream::connect(place.socket()).unwrap();
    std::thread::sleep(Duration::from_millis(1_600));
    assert!(running.ended().is_none(), "something is attached");
    drop(attached);
    let (code, text) = running.wait();
    assert_eq!(code, 0, "{text}");
    assert!(!place.socket().exists());
}

#[test]
fn a_bad_policy_file_stops_a_start_and_not_a_running_one() {
    let place = Place::new("policy");
    let file = place.0.join("p.yaml");
    let args = ["--store", "memory:", "--network-policy", file.to_str().unwrap()];
    let (code, text) = place.start(&args).wait();
    assert_eq!(code, 1);
    assert!(text.contains("p.yaml"), "{text}");
    std::fs::write(&file, "defaultAction: Deny\n").unwrap();
    let (code, text) = place.start(&args).wait();
    assert_eq!(code, 1);
    assert!(text.contains("p.yaml:1:"), "{text}");
    for nothing in ["", "# defaultAction: deny\n"] {
        std::fs::write(&file, nothing).unwrap();
        let (code, text) = place.start(&args).wait();
        assert_eq!(code, 1, "{nothing:?}");
        assert!(
            text.contains("p.yaml:") && text.contains("the document is empty"),
            "{text}"
        );
    }
    std::fs::write(&file, "defaultAction: deny\n").unwrap();
    let mut running = place.start(&args);
    wait_for("it to serve", || answers(&place.socket()));
    for (bad, times) in [("rules: 7\n", 1), ("", 2)] {
        std::fs::write(&file, bad).unwrap();
        running.signal(Signal::SIGHUP);
        running.says("the policy in force stays", times);
        assert!(answers(&place.socket()));
    }
    running.signal(Signal::SIGTERM);
    let (code, text) = running.wait();
    assert_eq!(code, 0);
    assert_eq!(text.matches("the policy in force stays").count(), 2, "{text}");
    assert!(text.contains("the document is empty"), "{text}");
}

#[test]
fn wrong_usage_is_exit_code_two() {
    let place = Place::new("usage");
    let (code, text) = place
        .start(&["--session-listen", "tcp://127.0.0.1:1", "--store", "etcd://h"])
        .wait();
    assert_eq!(code, 2);
    assert!(text.contains("needs TLS, which is not built yet"), "{text}");
    assert!(text.contains("etcd is not built yet"), "{text}");
    assert_eq!(place.start(&["--no-such-flag"]).wait().0, 2);
}

#[test]
fn a_store_in_memory_leaves_no_file() {
    let place = Place::new("memory");
    let state = place.0.join("state");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vnet-controlplane"));
    command
        .args(["--listen", &format!("unix://{}", place.socket().display())])
        .args(["--store", "memory:"])
        .env("XDG_STATE_HOME", &state)
        .env("HOME", &state)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let mut running = Running(command.spawn().unwrap(), String::new());
    wait_for("the socket", || answers(&place.socket()));
    kill(Pid::from_raw(running.0.id().cast_signed()), Signal::SIGTERM).unwrap();
    running.0.wait().unwrap();
    assert!(!state.exists(), "nothing was written");
}
