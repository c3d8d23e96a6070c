//! What needs no sshd: URLs, sockets, limits, and guests that do not answer. With a real one: `tests/tests/gv_ssh.rs`.

use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{fs, io, thread};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::*;
use crate::failure::with_causes;

mod hostile;
mod urls;

/// A key that opens nothing.
const KEY: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
";
const TARGET: &str = "192.168.127.2:22";
/// How long anything may take that is to happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vnetctl-ssh-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("key"), KEY).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn forward(&self) -> SshForward {
        SshForward {
            socket: self.path("host.sock"),
            dest: "/run/guest.sock".to_owned(),
            user: "core".to_owned(),
            identity: self.path("key"),
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A guest that cannot be reached.
#[derive(Default)]
struct Nowhere(AtomicUsize);

#[tonic::async_trait]
impl Tunnels for Nowhere {
    async fn open(&self, _: SocketAddr) -> io::Result<UnixStream> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Err(io::ErrorKind::HostUnreachable.into())
    }
}

/// A guest that takes streams and says what it is told to, and then nothing.
#[derive(Default)]
struct Silent {
    says: &'static [u8],
    streams: Mutex<Vec<UnixStream>>,
}

#[tonic::async_trait]
impl Tunnels for Silent {
    async fn open(&self, _: SocketAddr) -> io::Result<UnixStream> {
        let (ours, mut theirs) = UnixStream::pair()?;
        theirs.write_all(self.says).await?;
        self.streams.lock().unwrap().push(theirs);
        Ok(ours)
    }
}

fn quick() -> Timing {
    Timing {
        first_pause: Duration::from_millis(1),
        first_pause_max: Duration::from_millis(2),
        pause: Duration::from_millis(1),
        ..Timing::default()
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "still not so: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_guest_that_is_never_there_is_tried_sixty_times_and_then_the_forward_fails() {
    let directory = Directory::new();
    let forward = directory.forward();
    let nowhere = Arc::new(Nowhere::default());
    let bound = Forward::bind(&forward, TARGET.parse().unwrap(), nowhere.clone(), quick()).unwrap();
    assert!(forward.socket.exists());
    let error = bound.run().await.unwrap_err();
    assert_eq!(nowhere.0.load(Ordering::SeqCst), 60);
    let told = with_causes(&error);
    let expected = format!(
        "SSH forward {}: there is no stream to 192.168.127.2:22: host unreachable",
        forward.socket.display()
    );
    assert_eq!(told, expected);
    assert!(!forward.socket.exists());
}

#[test]
fn the_pauses_between_tries_are_gvproxys_and_take_about_a_minute() {
    let timing = Timing::default();
    let mut pause = timing.first_pause;
    let mut all = Duration::ZERO;
    for _ in 1..timing.first_tries {
        all += pause;
        pause = (pause * 2).min(timing.first_pause_max);
    }
    assert_eq!((timing.first_tries, all), (60, Duration::from_millis(56_500)));
    assert_eq!(timing.pause, Duration::from_millis(200));
}

#[tokio::test]
async fn a_guest_that_says_nothing_or_something_else_than_ssh_costs_a_handshakes_time_and_no_stream() {
    let long: &'static [u8] = vec![b'a'; 100_000].leak();
    let lines: &'static [u8] = "hello\r\n".repeat(20_000).into_bytes().leak();
    let silence: &[&'static [u8]] = &[
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-x\r\n",
        long,
        lines,
    ];
    for says in silence {
        let directory = Directory::new();
        let silent = Arc::new(Silent {
            says,
            ..Silent::default()
        });
        let timing = Timing {
            handshake: Duration::from_millis(50),
            // What does not fit into the stream is not our concern.
            dial: Duration::from_millis(50),
            first_tries: 3,
            ..quick()
        };
        let forward = directory.forward();
        let bound = Forward::bind(&forward, TARGET.parse().unwrap(), silent.clone(), timing).unwrap();
        let told = with_causes(&bound.run().await.unwrap_err());
        assert!(told.contains("is sshd running in the guest?"), "{told}");
        // Every stream was shut down, though the guest has not ended one.
        let streams = std::mem::take(&mut *silent.streams.lock().unwrap());
        for mut stream in streams {
            // Or reset, where not everything was read.
            let mut heard = Vec::new();
            let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut heard));
            assert!(ended.await.is_ok());
        }
    }
}

#[tokio::test]
async fn what_is_dropped_in_a_handshake_ends_its_stream_at_once() {
    let directory = Directory::new();
    let silent = Arc::new(Silent {
        says: b"SSH-2.0-x\r\n",
        ..Silent::default()
    });
    let forward = directory.forward();
    let bound = Forward::bind(&forward, TARGET.parse().unwrap(), silent.clone(), quick()).unwrap();
    let running = tokio::spawn(bound.run());
    eventually("it has dialled", || !silent.streams.lock().unwrap().is_empty()).await;
    let began = Instant::now();
    running.abort();
    let mut stream = silent.streams.lock().unwrap().pop().unwrap();
    stream.read_to_end(&mut Vec::new()).await.unwrap();
    assert!(running.await.unwrap_err().is_cancelled());
    assert!(!forward.socket.exists());
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn one_client_too_many_is_hung_up_on_and_counted_and_the_place_of_one_that_left_is_free() {
    let directory = Directory::new();
    // None of them ever gets further than waiting for the guest.
    let tunnels = SshTunnels::with_known_hosts(
        Arc::new(Silent::default()),
        Timing {
            first_use: PATIENCE,
            ..quick()
        },
        None,
    );
    let local = directory.path("local.sock").display().to_string();
    let url = format!(
        "ssh-tunnel://core@192.168.127.2/run/guest.sock?key={}",
        directory.path("key").display()
    );
    tunnels.expose(&local, &url).await.unwrap();
    let mut clients = Vec::new();
    for number in 1..=CLIENTS_MAX {
        clients.push(StdStream::connect(&local).unwrap());
        let number = u64::try_from(number).unwrap();
        eventually("it is taken", || {
            tunnels.counts(&local).unwrap().clients == number
        })
        .await;
    }
    for refused in 1..=3 {
        let one_more = StdStream::connect(&local).unwrap();
        eventually("it is counted", || {
            tunnels.counts(&local).unwrap().refused == refused
        })
        .await;
        let ended = tokio::task::spawn_blocking(move || (&one_more).read(&mut [0]));
        assert_eq!(ended.await.unwrap().unwrap(), 0);
    }
    let counts = tunnels.counts(&local).unwrap();
    assert_eq!((counts.clients, counts.served), (256, 0));
    tunnels.unexpose(&local).unwrap();
    let ended = tokio::task::spawn_blocking(move || {
        clients
            .iter()
            .all(|mut client| matches!(client.read(&mut [0]), Ok(0)))
    });
    assert!(ended.await.unwrap());
}

#[tokio::test]
async fn there_are_so_many_exposed_sockets_and_no_more() {
    let directory = Directory::new();
    let tunnels = SshTunnels::new(Arc::new(Nowhere::default()), quick());
    let url = format!(
        "ssh-tunnel://core@192.168.127.2/run/guest.sock?key={}",
        directory.path("key").display()
    );
    let local = |number: usize| directory.path(&format!("{number:03}.sock")).display().to_string();
    for number in 0..EXPOSED_MAX {
        tunnels.expose(&local(number), &url).await.unwrap();
    }
    let error = tunnels.expose(&local(EXPOSED_MAX), &url).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "there are 256 sockets over SSH already; unexpose one first"
    );
    assert!(!directory.path("256.sock").exists());
    let all = tunnels.all();
    assert_eq!(all.len(), EXPOSED_MAX);
    assert!(all.iter().map(|one| &one.local).is_sorted());
    tunnels.unexpose(&local(7)).unwrap();
    tunnels.expose(&local(EXPOSED_MAX), &url).await.unwrap();
    drop(tunnels);
    let left = fs::read_dir(&directory.0).unwrap().count();
    assert_eq!(left, 1, "only the key");
}

#[tokio::test]
async fn a_client_whose_guest_is_not_there_is_hung_up_on_and_counted() {
    let directory = Directory::new();
    let nowhere = Arc::new(Nowhere::default());
    let tunnels = SshTunnels::new(
        nowhere.clone(),
        Timing {
            first_tries: 5,
            ..quick()
        },
    );
    let local = directory.path("local.sock").display().to_string();
    let url = format!(
        "ssh-tunnel://core@192.168.127.2/run/guest.sock?key={}",
        directory.path("key").display()
    );
    tunnels.expose(&local, &url).await.unwrap();
    let client = StdStream::connect(&local).unwrap();
    let ended = tokio::task::spawn_blocking(move || (&client).read(&mut [0]));
    assert_eq!(ended.await.unwrap().unwrap(), 0);
    assert_eq!(tunnels.counts(&local).unwrap().failed, 1);
    assert_eq!(nowhere.0.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn who_is_hung_up_on_is_told_with_both_sockets_the_guest_and_the_cause() {
    let directory = Directory::new();
    let identity = Identity::read(&directory.path("key"), None).unwrap();
    let login = Login {
        user: "core".to_owned(),
        identity,
        password: None,
    };
    let timing = Timing {
        first_tries: 1,
        ..quick()
    };
    let target = TARGET.parse().unwrap();
    let dialer = Dialer::new(
        Arc::new(Nowhere::default()),
        target,
        login,
        HostKeys::Ignored,
        timing,
    );
    let guest = Guest::new(dialer, "/run/guest.sock".to_owned());
    let error = guest.open().await.unwrap_err();
    assert_eq!(
        serve::hung_up_on(Path::new("/run/host.sock"), &guest, &error),
        "SSH forward /run/host.sock to /run/guest.sock at 192.168.127.2:22: a client was hung up on: there is no \
         stream to 192.168.127.2:22: host unreachable"
    );
}

#[tokio::test]
async fn a_socket_is_replaced_and_nothing_else_is_touched() {
    let directory = Directory::new();
    let path = directory.path("host.sock");
    let (old, old_file) = socket::replace(&path).unwrap();
    let (_new, new_file) = socket::replace(&path).unwrap();
    // What is exposed at run time replaces none that is served.
    let told = socket::bind(&path).unwrap_err().to_string();
    assert!(told.ends_with("bind: address already in use"), "{told}");
    // The older one leaves what is not its own any more.
    drop((old, old_file));
    let found = fs::symlink_metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    drop(new_file);
    assert!(!path.exists());

    let target = directory.path("key");
    std::os::unix::fs::symlink(&target, directory.path("link")).unwrap();
    nix::unistd::mkfifo(&directory.path("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    fs::create_dir(directory.path("directory")).unwrap();
    for (name, kind) in [
        ("key", "a file"),
        ("link", "a symbolic link"),
        ("pipe", "a named pipe"),
        ("directory", "a directory"),
    ] {
        let path = directory.path(name);
        let told = socket::replace(&path).unwrap_err().to_string();
        let expected = format!(
            "{} is {kind}, and only a socket is replaced; remove it, or name another path",
            path.display()
        );
        assert_eq!(told, expected);
        assert!(fs::symlink_metadata(&path).is_ok());
    }
    assert_eq!(fs::read_to_string(target).unwrap(), KEY);
    let device = socket::replace(Path::new("/dev/null")).unwrap_err().to_string();
    assert!(device.starts_with("/dev/null is a device"), "{device}");

    let missing = directory.path("no/such.sock");
    let told = socket::replace(&missing).unwrap_err().to_string();
    assert_eq!(
        told,
        format!(
            "listen unix {}: bind: no such file or directory",
            missing.display()
        )
    );
    let long = directory.path(&"a".repeat(120));
    let told = socket::replace(&long).unwrap_err().to_string();
    assert!(told.ends_with("bind: file name too long"), "{told}");
}

#[tokio::test]
async fn a_forward_whose_key_is_none_leaves_no_socket() {
    let directory = Directory::new();
    let mut forward = directory.forward();
    forward.identity = directory.path("none");
    let bound = Forward::bind(
        &forward,
        TARGET.parse().unwrap(),
        Arc::new(Nowhere::default()),
        quick(),
    );
    let told = with_causes(&bound.unwrap_err());
    let expected = format!(
        "SSH forward {}: identity {}: cannot be read: No such file or directory (os error 2)",
        forward.socket.display(),
        forward.identity.display()
    );
    assert_eq!(told, expected);
    assert!(!forward.socket.exists());
}

#[tokio::test]
async fn two_that_expose_the_same_at_once_are_one_and_one_error() {
    let directory = Directory::new();
    let tunnels = SshTunnels::new(Arc::new(Nowhere::default()), quick());
    let local = directory.path("local.sock").display().to_string();
    let url = format!(
        "ssh-tunnel://core@192.168.127.2/run/guest.sock?key={}",
        directory.path("key").display()
    );
    let (one, other) = tokio::join!(tunnels.expose(&local, &url), tunnels.expose(&local, &url));
    assert!(one.is_ok() != other.is_ok(), "{one:?} {other:?}");
    assert!(
        thread::spawn(move || StdStream::connect(local))
            .join()
            .unwrap()
            .is_ok()
    );
}

#[test]
fn no_passphrase_and_no_key_is_in_what_is_printed_for_debugging() {
    let remote = Remote::parse("ssh-tunnel://core:word@192.168.127.2/s?key=/k&passphrase=phrase").unwrap();
    let printed = format!("{remote:?}");
    assert!(
        !printed.contains("word") && !printed.contains("phrase"),
        "{printed}"
    );
}
