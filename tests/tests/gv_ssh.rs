//! Forwards over SSH against a real sshd: keys, half close, retries, clients that are slow, and what is exposed at run time.
#![cfg(target_os = "linux")]

use std::convert::Infallible;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use vnet_tests::sshd::Sshd;
use vnet_tests::{PATIENCE, eventually};
use vnetctl::gvproxy::Tunnels;
use vnetctl::gvproxy::config::SshForward;
use vnetctl::gvproxy::ssh::{Counts, Forward, ForwardError, SshTunnels, Timing};

/// The network is loopback.
#[derive(Default)]
struct Loopback {
    opened: AtomicUsize,
}

impl Loopback {
    fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }
}

#[tonic::async_trait]
impl Tunnels for Loopback {
    async fn open(&self, target: SocketAddr) -> std::io::Result<tokio::net::UnixStream> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        let (ours, mut theirs) = tokio::net::UnixStream::pair()?;
        // As the dataplane does: the stream is there at once, and ends if there is nobody.
        tokio::spawn(async move {
            if let Ok(mut guest) = TcpStream::connect(target).await {
                let _ = tokio::io::copy_bidirectional(&mut theirs, &mut guest).await;
            }
        });
        Ok(ours)
    }
}

/// Patience as short as the machine allows.
fn quick() -> Timing {
    let pause = Duration::from_millis(10);
    Timing {
        first_pause: pause,
        first_pause_max: pause,
        pause,
        first_use: PATIENCE,
        ..Timing::default()
    }
}

/// A runtime, a network and an sshd.
struct Stage {
    sshd: Sshd,
    network: Arc<Loopback>,
    // Last, so that what it runs ends after what is asked of it.
    runtime: Runtime,
}

impl Stage {
    fn new(sshd: Sshd) -> Self {
        Self {
            sshd,
            network: Arc::default(),
            runtime: Runtime::new().unwrap(),
        }
    }

    /// A forward that runs, to the guest's socket `guest`.
    fn forward(&self, identity: &Path, timing: Timing) -> Running {
        let socket = self.sshd.path("host.sock");
        let forward = SshForward {
            socket: socket.clone(),
            dest: self.sshd.path("guest.sock").display().to_string(),
            user: self.sshd.user().to_owned(),
            identity: identity.to_owned(),
        };
        let _inside = self.runtime.enter();
        let network: Arc<dyn Tunnels> = self.network.clone();
        let forward = Forward::bind(&forward, self.sshd.address(), network, timing).unwrap();
        let counts = forward.counts();
        let running = self.runtime.spawn(forward.run());
        Running {
            socket,
            counts,
            running,
        }
    }

    fn tunnels(&self, timing: Timing) -> SshTunnels {
        let network: Arc<dyn Tunnels> = self.network.clone();
        SshTunnels::with_known_hosts(network, timing, Some(self.sshd.path("known_hosts")))
    }

    /// The URL of the guest's socket, with more of a query.
    fn url(&self, query: &str) -> String {
        let guest = self.sshd.path("guest.sock");
        format!(
            "ssh-tunnel://{}@{}{}?{query}",
            self.sshd.user(),
            self.sshd.address(),
            guest.display()
        )
    }

    /// What a guest serves at its socket: each client is given to `serve`.
    fn guest(&self, serve: impl Fn(UnixStream) + Send + Sync + 'static) {
        let path = self.sshd.path("guest.sock");
        let listener = UnixListener::bind(&path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
        let serve = Arc::new(serve);
        thread::spawn(move || {
            for client in listener.incoming() {
                let serve = Arc::clone(&serve);
                thread::spawn(move || serve(client.unwrap()));
            }
        });
    }
}

struct Running {
    socket: PathBuf,
    counts: Arc<Counts>,
    running: JoinHandle<Result<Infallible, ForwardError>>,
}

impl Running {
    fn connect(&self) -> UnixStream {
        connect(&self.socket)
    }

    /// What it ended with.
    fn failure(self, stage: &Stage) -> String {
        let ended = stage.runtime.block_on(self.running).unwrap();
        let mut error: &dyn std::error::Error = &ended.unwrap_err();
        let mut told = error.to_string();
        while let Some(cause) = error.source() {
            told = format!("{told}: {cause}");
            error = cause;
        }
        told
    }
}

fn connect(socket: &Path) -> UnixStream {
    let client = UnixStream::connect(socket).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    client
}

/// Everything that comes in, and then the same back.
fn after_the_end(mut client: UnixStream) {
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    let _ = client.write_all(&all);
}

/// Sends, shuts down, and reads to the end, which comes early where nobody is there.
fn exchange(mut client: &UnixStream, bytes: &[u8]) -> Vec<u8> {
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = (&*client).write_all(bytes);
            let _ = client.shutdown(Shutdown::Write);
        });
        let mut back = Vec::new();
        let _ = client.read_to_end(&mut back);
        back
    })
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

#[test]
fn every_kind_and_form_of_key_is_let_in_and_a_megabyte_comes_back_unchanged() {
    let stage = Stage::new(Sshd::started());
    stage.guest(after_the_end);
    let bytes = noise(1 << 20);
    let kinds: &[&[&str]] = &[
        &["-t", "ed25519"],
        &["-t", "rsa", "-b", "2048"],
        &["-t", "rsa", "-b", "2048", "-m", "PEM"],
        &["-t", "rsa", "-b", "2048", "-m", "PKCS8"],
        &["-t", "ecdsa", "-b", "256"],
        &["-t", "ecdsa", "-b", "256", "-m", "PEM"],
        &["-t", "ecdsa", "-b", "384"],
        &["-t", "ecdsa", "-b", "521"],
        &["-t", "ecdsa", "-b", "521", "-m", "PKCS8"],
    ];
    for (number, kind) in kinds.iter().enumerate() {
        let mut arguments = kind.to_vec();
        arguments.extend(["-N", ""]);
        let key = stage.sshd.key(&format!("key{number}"), &arguments);
        let forward = stage.forward(&key, quick());
        assert_eq!(exchange(&forward.connect(), &bytes), bytes, "{kind:?}");
        let mode = fs::metadata(&forward.socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        forward.running.abort();
        eventually("its socket is removed", || !forward.socket.exists());
    }
}

#[test]
fn keys_with_a_passphrase_are_opened_by_it_and_each_wrong_file_is_one_error() {
    let stage = Stage::new(Sshd::started());
    stage.guest(after_the_end);
    let tunnels = stage.tunnels(quick());
    let local = stage.sshd.path("local.sock").display().to_string();
    let expose = |query: &str| {
        let url = stage.url(query);
        stage
            .runtime
            .block_on(tunnels.expose(&local, &url))
            .map_err(|error| {
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                format!("{error}{}", cause.unwrap_or_default())
            })
    };

    let forms: &[&[&str]] = &[
        &["-t", "ed25519", "-a", "4"],
        &["-t", "rsa", "-b", "2048", "-m", "PEM"],
        &["-t", "rsa", "-b", "2048", "-m", "PKCS8"],
        &["-t", "ecdsa", "-a", "4"],
    ];
    for (number, form) in forms.iter().enumerate() {
        let mut arguments = form.to_vec();
        arguments.extend(["-N", "open sesame"]);
        let key = stage.sshd.key(&format!("locked{number}"), &arguments);
        let key = key.display();
        expose(&format!("key={key}&passphrase=open+sesame"))
            .unwrap_or_else(|error| panic!("{form:?}: {error}"));
        assert_eq!(
            exchange(&connect(Path::new(&local)), b"through"),
            b"through",
            "{form:?}"
        );
        tunnels.unexpose(&local).unwrap();

        let told = expose(&format!("key={key}")).unwrap_err();
        assert!(
            told.contains("is encrypted and no passphrase is given"),
            "{form:?}: {told}"
        );
        assert!(told.contains(&key.to_string()), "{told}");
        let told = expose(&format!("key={key}&passphrase=open+simsim")).unwrap_err();
        assert!(
            told.contains("is not opened by the passphrase"),
            "{form:?}: {told}"
        );
    }

    // A passphrase that no key needs changes nothing.
    let plain = stage.sshd.key("plain", &["-t", "ecdsa", "-m", "PKCS8", "-N", ""]);
    expose(&format!("key={}&passphrase=needless", plain.display())).unwrap();
    assert_eq!(exchange(&connect(Path::new(&local)), b"through"), b"through");
    tunnels.unexpose(&local).unwrap();

    let old = stage
        .sshd
        .key("old", &["-t", "ecdsa", "-m", "PEM", "-N", "open sesame"]);
    let none = stage.sshd.path("none");
    let text = stage.sshd.path("text");
    fs::write(&text, "not a key\n").unwrap();
    let large = stage.sshd.path("large");
    fs::write(&large, vec![b'-'; 100_000]).unwrap();
    let pipe = stage.sshd.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let public = PathBuf::from(format!("{}.pub", plain.display()));
    let directory = stage.sshd.path("");
    for (file, expected) in [
        (
            &old,
            "in PEM's old form, which is not read; ssh-keygen -p -f FILE",
        ),
        (&none, "cannot be read"),
        (&text, "is no private key"),
        (&large, "more than 65536 bytes"),
        (&pipe, "is not a regular file"),
        (&directory, "is not a regular file"),
        (&public, "is a public key; name the private one"),
    ] {
        let told = expose(&format!("key={}&passphrase=x", file.display())).unwrap_err();
        assert!(told.contains(expected), "{}: {told}", file.display());
    }
    assert_eq!(tunnels.all(), []);
}

#[test]
fn either_side_may_end_first_and_hear_the_other_to_its_end() {
    let stage = Stage::new(Sshd::started());
    let (said, heard) = std::sync::mpsc::channel();
    let said = Mutex::new(said);
    stage.guest(move |mut client| {
        client.write_all(b"all that I say").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        said.lock().unwrap().send(all).unwrap();
    });
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(&key, quick());

    let mut client = forward.connect();
    let mut all = Vec::new();
    // The guest's end of file is here while the other way is open.
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"all that I say");
    let bytes = noise(3 << 20);
    client.write_all(&bytes).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert!(heard.recv_timeout(PATIENCE).unwrap() == bytes);
    // Once both have ended, so has the client's place.
    eventually("the client is gone", || forward.counts.now().clients == 0);
    assert_eq!(forward.counts.now().served, 1);
    // And with everything in order the connection served the next.
    let mut next = forward.connect();
    let mut all = Vec::new();
    next.read_to_end(&mut all).unwrap();
    assert_eq!(
        (all.as_slice(), stage.network.opened()),
        (&b"all that I say"[..], 1)
    );
}

#[test]
fn socat_goes_through_as_through_any_socket() {
    let stage = Stage::new(Sshd::started());
    stage.guest(after_the_end);
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(&key, quick());
    let bytes = noise(500_000);
    let file = stage.sshd.path("bytes");
    fs::write(&file, &bytes).unwrap();
    // Of a socket that is closed before it has read, socat would wait for ever.
    let through = std::process::Command::new("timeout")
        .args(["60", "socat", "-t", "30", "-"])
        .arg(format!("UNIX-CONNECT:{}", forward.socket.display()))
        .stdin(fs::File::open(&file).unwrap())
        .output()
        .unwrap();
    assert!(through.status.success(), "{through:?}");
    assert!(through.stdout == bytes);
}

#[test]
fn a_client_of_an_sshd_that_comes_up_late_waits_and_is_served() {
    let mut stage = Stage::new(Sshd::new());
    stage.guest(after_the_end);
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(
        &key,
        Timing {
            first_tries: u32::MAX,
            ..quick()
        },
    );
    // The socket is there before anything else.
    let client = forward.connect();
    eventually("it has tried in vain", || stage.network.opened() >= 3);
    assert!(!forward.running.is_finished());
    stage.sshd.start();
    assert_eq!(exchange(&client, b"here at last"), b"here at last");
}

#[test]
fn a_guest_that_starts_again_is_connected_to_again_by_the_next_client() {
    let mut stage = Stage::new(Sshd::started());
    stage.guest(after_the_end);
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(&key, quick());
    assert_eq!(exchange(&forward.connect(), b"before"), b"before");
    let cut = forward.connect();
    eventually("it is served", || forward.counts.now().served == 2);

    stage.sshd.stop();
    // Whoever was connected is cut off.
    let mut rest = Vec::new();
    let _ = (&cut).read_to_end(&mut rest);
    assert_eq!(rest, b"");
    // Whoever comes now is turned away, after three tries.
    let opened = stage.network.opened();
    assert_eq!((&forward.connect()).read(&mut [0]).unwrap(), 0);
    assert_eq!(stage.network.opened() - opened, 3);
    assert_eq!(forward.counts.now().failed, 1);

    stage.sshd.start();
    assert_eq!(exchange(&forward.connect(), b"after"), b"after");
    assert!(!forward.running.is_finished());
}

#[test]
fn a_connection_that_died_unnoticed_is_replaced_before_the_client_knows() {
    let mut stage = Stage::new(Sshd::started());
    stage.guest(after_the_end);
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(&key, quick());
    assert_eq!(exchange(&forward.connect(), b"before"), b"before");
    for round in 0..5 {
        stage.sshd.stop();
        stage.sshd.start();
        // At once, so that the end of the old one may or may not have been heard.
        assert_eq!(exchange(&forward.connect(), b"after"), b"after", "{round}");
    }
    assert_eq!(forward.counts.now().failed, 0);
}

#[test]
fn a_key_that_lets_nobody_in_ends_the_forward_after_its_tries_with_the_reason() {
    let stage = Stage::new(Sshd::started());
    let key = stage.sshd.make_key("stranger", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(
        &key,
        Timing {
            first_tries: 4,
            ..quick()
        },
    );
    let socket = forward.socket.clone();
    let told = forward.failure(&stage);
    assert!(
        told.starts_with(&format!("SSH forward {}", socket.display())),
        "{told}"
    );
    let address = stage.sshd.address();
    assert!(told.contains(&format!("is not let in at {address} ")), "{told}");
    assert!(told.contains("authorized_keys"), "{told}");
    assert_eq!(stage.network.opened(), 4);
    assert!(!socket.exists());
}

#[test]
fn a_client_of_a_socket_that_the_guest_does_not_have_is_turned_away_and_the_connection_kept() {
    let stage = Stage::new(Sshd::started());
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(&key, quick());
    for failed in 1..=3 {
        assert_eq!((&forward.connect()).read(&mut [0]).unwrap(), 0);
        eventually("it is counted", || forward.counts.now().failed == failed);
    }
    // sshd is asked three times each, over the one connection, which it answers that it lives.
    let asked = stage.sshd.log().matches("guest.sock").count();
    assert!(asked >= 9, "{asked}: {}", stage.sshd.log());
    stage.guest(after_the_end);
    assert_eq!(exchange(&forward.connect(), b"now"), b"now");
    assert_eq!(stage.network.opened(), 1);
}

#[test]
fn forty_clients_at_once_are_each_given_their_own_bytes() {
    let stage = Stage::new(Sshd::started());
    stage.guest(after_the_end);
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(&key, quick());
    let clients: Vec<UnixStream> = (0..40).map(|_| forward.connect()).collect();
    thread::scope(|scope| {
        for (number, client) in clients.iter().enumerate() {
            scope.spawn(move || {
                let bytes = noise(50_000 + number);
                assert!(exchange(client, &bytes) == bytes, "{number}");
            });
        }
    });
    drop(clients);
    eventually("all are gone", || forward.counts.now().clients == 0);
    let counts = forward.counts.now();
    assert_eq!((counts.served, counts.refused, counts.failed), (40, 0, 0));
    // Few connections are kept: two processes each.
    eventually("few sessions are left", || stage.sshd.sessions() <= 8);
}

#[test]
fn a_client_that_never_reads_delays_nobody_and_holds_little_and_loses_nothing() {
    let stage = Stage::new(Sshd::started());
    let written = Arc::new(AtomicUsize::new(0));
    let heard = Arc::new(AtomicUsize::new(0));
    let is_first = AtomicBool::new(true);
    let (out, into) = (Arc::clone(&written), Arc::clone(&heard));
    stage.guest(move |client| {
        if !is_first.swap(false, Ordering::SeqCst) {
            return after_the_end(client);
        }
        thread::scope(|scope| {
            // Speaks for ever, and listens.
            scope.spawn(|| {
                while let Ok(count) = (&client).write(&[7; 65_536]) {
                    out.fetch_add(count, Ordering::SeqCst);
                }
            });
            let mut buffer = vec![0; 65_536];
            while let Ok(count @ 1..) = (&client).read(&mut buffer) {
                into.fetch_add(count, Ordering::SeqCst);
            }
            let _ = client.shutdown(Shutdown::Both);
        });
    });
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(&key, quick());
    let stuck = forward.connect();
    // What the guest can say to somebody who does not read comes to an end.
    let mut last = usize::MAX;
    eventually("the guest has to wait", || {
        thread::sleep(Duration::from_millis(300));
        let now = written.load(Ordering::SeqCst);
        now > 1 << 20 && std::mem::replace(&mut last, now) == now
    });
    assert!(last < 24 << 20, "{last} bytes are held for one client");

    // Others do not notice.
    let began = Instant::now();
    for _ in 0..10 {
        let bytes = noise(200_000);
        assert!(exchange(&forward.connect(), &bytes) == bytes);
    }
    assert!(began.elapsed() < PATIENCE / 3, "{:?}", began.elapsed());

    // Once it reads, it is heard again, and what was held is all there.
    thread::scope(|scope| {
        scope.spawn(|| (&stuck).write_all(&noise(1 << 20)).unwrap());
        let mut all = vec![0; last];
        (&stuck).read_exact(&mut all).unwrap();
        assert!(all.iter().all(|byte| *byte == 7));
        eventually("the guest has heard it", || {
            (&stuck).read_exact(&mut all[..65_536]).unwrap();
            heard.load(Ordering::SeqCst) == 1 << 20
        });
    });
    drop(stuck);
    eventually("it is gone", || forward.counts.now().clients == 0);
}

#[test]
fn a_client_that_only_shut_down_is_waited_for_and_one_that_is_gone_is_not() {
    let stage = Stage::new(Sshd::started());
    let gone = Duration::from_millis(200);
    stage.guest(move |mut client| {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        thread::sleep(gone * 5);
        let _ = client.write_all(&all);
        if all == b"deaf" {
            // Has heard the end, and keeps its side open.
            thread::sleep(PATIENCE * 2);
        }
    });
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(&key, Timing { gone, ..quick() });
    assert_eq!(exchange(&forward.connect(), b"patient"), b"patient");
    eventually("it is gone", || forward.counts.now().clients == 0);

    let mut client = forward.connect();
    client.write_all(b"deaf").unwrap();
    drop(client);
    eventually("it is served", || forward.counts.now().served == 2);
    eventually("its place is free", || forward.counts.now().clients == 0);
}

#[test]
fn ending_a_forward_ends_its_clients_its_socket_and_its_sessions_within_a_second() {
    let stage = Stage::new(Sshd::started());
    // Neither side says anything, and another does not stop.
    let number = AtomicUsize::new(0);
    stage.guest(move |mut client| {
        if number.fetch_add(1, Ordering::SeqCst) == 0 {
            while client.write_all(&[7; 65_536]).is_ok() {}
        } else {
            let _ = client.read(&mut [0]);
        }
    });
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let forward = stage.forward(&key, quick());
    let clients: Vec<UnixStream> = (0..3).map(|_| forward.connect()).collect();
    eventually("all are served", || forward.counts.now().served == 3);

    let began = Instant::now();
    forward.running.abort();
    eventually("its socket is removed", || !forward.socket.exists());
    for client in &clients {
        let _ = (&*client).read_to_end(&mut Vec::new());
    }
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    eventually("no session is left", || stage.sshd.sessions() == 0);
    assert_eq!(forward.counts.now().clients, 0);
}

#[test]
fn what_is_exposed_connects_with_its_first_client_is_listed_and_ends_when_unexposed() {
    let stage = Stage::new(Sshd::started());
    stage.guest(after_the_end);
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let tunnels = stage.tunnels(quick());
    let local = stage.sshd.path("local.sock");
    let name = local.display().to_string();
    let url = stage.url(&format!("key={}&passphrase=secret", key.display()));
    stage.runtime.block_on(tunnels.expose(&name, &url)).unwrap();
    assert_eq!(stage.network.opened(), 0);
    let listed = serde_json::to_value(tunnels.all()).unwrap();
    let shown = url.replace("secret", "xxxxx");
    assert_eq!(
        listed,
        serde_json::json!([{"local": name, "remote": shown, "protocol": "unix"}])
    );

    let told = stage.runtime.block_on(tunnels.expose(&name, &url)).unwrap_err();
    assert_eq!(
        told.to_string(),
        format!("proxy already running for unix on {name}")
    );

    assert_eq!(exchange(&connect(&local), b"through"), b"through");
    assert_eq!(stage.network.opened(), 1);
    let open = connect(&local);
    eventually("it is served", || tunnels.counts(&name).unwrap().served == 2);
    let began = Instant::now();
    tunnels.unexpose(&name).unwrap();
    assert!(!local.exists());
    let _ = (&open).read_to_end(&mut Vec::new());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    eventually("no session is left", || stage.sshd.sessions() == 0);
    assert_eq!(
        tunnels.unexpose(&name).unwrap_err().to_string(),
        "proxy not found"
    );
    assert_eq!(tunnels.all(), []);

    // Dropping them ends them as well.
    stage.runtime.block_on(tunnels.expose(&name, &url)).unwrap();
    drop(tunnels);
    assert!(!local.exists());
}

#[test]
fn what_is_exposed_before_its_guest_runs_waits_for_it_with_all_its_clients() {
    let mut stage = Stage::new(Sshd::new());
    stage.guest(after_the_end);
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let tunnels = stage.tunnels(Timing {
        first_tries: u32::MAX,
        ..quick()
    });
    let local = stage.sshd.path("local.sock");
    let name = local.display().to_string();
    let url = stage.url(&format!("key={}", key.display()));
    stage.runtime.block_on(tunnels.expose(&name, &url)).unwrap();
    let clients = [connect(&local), connect(&local)];
    eventually("it has tried in vain", || stage.network.opened() >= 3);
    stage.sshd.start();
    for client in &clients {
        assert_eq!(exchange(client, b"here at last"), b"here at last");
    }
}

#[test]
fn a_host_key_is_checked_where_that_is_asked_for_and_only_there() {
    let stage = Stage::new(Sshd::started());
    stage.guest(after_the_end);
    let key = stage.sshd.key("key", &["-t", "ed25519", "-N", ""]);
    let local = stage.sshd.path("local.sock");
    let name = local.display().to_string();
    let tunnels = stage.tunnels(quick());
    let url = stage.url(&format!("key={}&secure=true", key.display()));
    let address = stage.sshd.address();
    let host = format!("[{}]:{}", address.ip(), address.port());
    let public = |name: &str| {
        let text = fs::read_to_string(stage.sshd.path(&format!("{name}.pub"))).unwrap();
        text.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
    };
    let is_served = |known: &str| {
        fs::write(stage.sshd.path("known_hosts"), known).unwrap();
        stage.runtime.block_on(tunnels.expose(&name, &url)).unwrap();
        let opened = stage.network.opened();
        let back = exchange(&connect(&local), b"through");
        let counts = tunnels.counts(&name).unwrap();
        tunnels.unexpose(&name).unwrap();
        // What will never do is tried once.
        assert_eq!(stage.network.opened(), opened + 1, "{counts:?}");
        back == b"through"
    };
    assert!(is_served(&format!("{host} {}\n", public("host_ed25519"))));
    // The kind that is known is the kind that is asked for, though the host has another.
    assert!(is_served(&format!(
        "# a comment\n{host} {}\n",
        public("host_ecdsa")
    )));
    assert!(!is_served(&format!("{host} {}\n", public("key"))));
    assert!(!is_served(&format!("elsewhere {}\n", public("host_ed25519"))));
    assert!(!is_served(""));
    fs::remove_file(stage.sshd.path("known_hosts")).unwrap();
    let url = stage.url(&format!("key={}&secure=false", key.display()));
    stage.runtime.block_on(tunnels.expose(&name, &url)).unwrap();
    assert_eq!(exchange(&connect(&local), b"through"), b"through");
}
