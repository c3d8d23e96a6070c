//! Guests and load for measurements and for links that lose: `guest` stands a network namespace behind a
//! dataplane's (or passt's) socket and runs a command in it, `serve`, `connect` and `hold` make connections.
//! What is measured is printed as one line of JSON.
//!
//! It moves frames between a TAP device and a Unix socket, one thread a direction, several frames a
//! call on a stream unless `--batch 1` (as QEMU writes them); framed as each kind of hypervisor has it.
#![cfg_attr(not(target_os = "linux"), allow(unused))]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it prints what it measured"
)]

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    linux::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("vnet-load needs Linux's namespaces and TAP devices");
    std::process::exit(2);
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::VecDeque;
    use std::fs::{File, OpenOptions};
    use std::io::{self, Read as _, Write as _};
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};
    use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::path::{Path, PathBuf};
    use std::process::{Command, ExitCode};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use clap::{Args, Parser, ValueEnum};
    use nix::errno::Errno;
    use nix::libc;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpSocket, TcpStream};

    type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

    /// Stands in for guests, and makes load.
    #[derive(Debug, Parser)]
    #[command(name = "vnet-load")]
    enum Cli {
        /// Run a command in a network namespace behind a user-mode network's socket
        Guest(GuestArgs),
        /// Echo on TCP ports
        Serve(ServeArgs),
        /// Connect, exchange a byte, close, as often as it goes
        Connect(ConnectArgs),
        /// Hold connections until stdin ends
        Hold(HoldArgs),
        /// Begin connections that nobody answers, and run a command meanwhile
        Knock(KnockArgs),
    }

    #[derive(Debug, Args)]
    struct GuestArgs {
        /// The network's socket
        #[arg(long, required_unless_present = "on_stdin")]
        socket: Option<PathBuf>,
        /// It is standard input, connected already
        #[arg(long, conflicts_with = "socket")]
        on_stdin: bool,
        /// How frames are put on it
        #[arg(long, default_value = "qemu")]
        framing: Framing,
        /// MTU in bytes
        #[arg(long, default_value_t = 1500)]
        mtu: u32,
        /// The guest's address
        #[arg(long, default_value = "192.168.127.2/24")]
        address: String,
        /// Give it none: its command asks for one
        #[arg(long, conflicts_with = "address")]
        no_address: bool,
        /// Its hardware address, if not one that follows from its address
        #[arg(long)]
        mac: Option<String>,
        /// Its router
        #[arg(long, default_value = "192.168.127.1")]
        gateway: String,
        /// Frames written at once at most, on a stream
        #[arg(long, default_value_t = 64)]
        batch: usize,
        /// Frames of a thousand that are lost, each way
        #[arg(long, default_value_t = 0)]
        loss: u64,
        /// Frames of a thousand that up to three others overtake, of those under way together, each way
        #[arg(long, default_value_t = 0)]
        reorder: u64,
        /// What is lost and late follows from this
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    }

    #[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
    enum Framing {
        /// A stream with 4-byte big-endian lengths
        Qemu,
        /// A stream with 2-byte little-endian lengths
        Short,
        /// The same behind a handshake
        Vpnkit,
        /// The same behind a request for `/connect`, which leaves with the first frames in one write
        Connect,
        /// Datagrams, on a socket that is connected, as vfkit's
        Unixgram,
        /// Datagrams, on a socket that takes them from anybody, as QEMU's
        UnixgramOpen,
        /// Records
        Unixpacket,
    }

    #[derive(Debug, Args)]
    struct ServeArgs {
        /// Where to listen
        #[arg(long)]
        bind: Ipv4Addr,
        /// The first port
        #[arg(long, default_value_t = 7000)]
        port: u16,
        /// How many ports
        #[arg(long, default_value_t = 8)]
        ports: u16,
    }

    #[derive(Debug, Args)]
    struct Target {
        /// The server's address, or the first of many
        #[arg(long)]
        to: Ipv4Addr,
        /// How many addresses, each used in turn
        #[arg(long, default_value_t = 1)]
        addresses: u32,
        /// The first port
        #[arg(long, default_value_t = 7000)]
        port: u16,
        /// How many ports, each used in turn
        #[arg(long, default_value_t = 8)]
        ports: u16,
    }

    #[derive(Debug, Args)]
    struct ConnectArgs {
        #[command(flatten)]
        target: Target,
        /// How many at once
        #[arg(long, default_value_t = 64)]
        parallel: usize,
        /// For so long
        #[arg(long, default_value_t = 3.0)]
        secs: f64,
        /// And no more than so many
        #[arg(long, default_value_t = usize::MAX)]
        count: usize,
    }

    #[derive(Debug, Args)]
    struct HoldArgs {
        #[command(flatten)]
        target: Target,
        /// How many
        #[arg(long, default_value_t = 10_000)]
        count: usize,
    }

    #[derive(Debug, Args)]
    struct KnockArgs {
        #[command(flatten)]
        target: Target,
        /// How many
        #[arg(long, default_value_t = 1_000)]
        count: usize,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    }

    pub(super) fn main() -> ExitCode {
        let ended = match Cli::parse() {
            Cli::Guest(args) => guest(args),
            Cli::Serve(args) => run(serve(args)),
            Cli::Connect(args) => run(connect(args)),
            Cli::Hold(args) => run(hold(args)),
            Cli::Knock(args) => knock(&args),
        };
        ended.unwrap_or_else(|error| {
            eprintln!("vnet-load: {error}");
            ExitCode::from(125)
        })
    }

    fn run(work: impl Future<Output = Result<()>>) -> Result<ExitCode> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(work)?;
        Ok(ExitCode::SUCCESS)
    }

    // ---- a guest

    /// 64 KiB and an Ethernet header.
    const FRAME_BYTES_MAX: usize = 65_550;
    const STREAM_BYTES: usize = 512 * 1024;
    const TAP: &str = "tap0";

    fn guest(args: GuestArgs) -> Result<ExitCode> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| {
            format!("cannot make a network namespace: {e} (run it as root, or under unshare -Ur)")
        })?;
        let tap = Arc::new(open_tap()?);
        ip(&["link", "set", "lo", "up"])?;
        // The same guest has the same hardware address whenever it comes back. Before the link is up: the first
        // address that is seen on it is the guest's.
        let number = args.address.split(['.', '/']).nth(3);
        let number = number.and_then(|n| n.parse::<u8>().ok()).unwrap_or_default();
        ip(&[
            "link",
            "set",
            TAP,
            "address",
            &args.mac.unwrap_or(format!("52:54:00:00:00:{number:02x}")),
        ])?;
        ip(&[
            "link",
            "set",
            TAP,
            "mtu",
            &args.mtu.to_string(),
            "txqueuelen",
            "4096",
            "up",
        ])?;
        if !args.no_address {
            ip(&["addr", "add", &args.address, "dev", TAP])?;
            ip(&["route", "add", "default", "via", &args.gateway])?;
        }
        let weather = |direction: u64| Weather::new(args.loss, args.reorder, args.seed ^ (direction << 32));
        let (into, out_of) = (weather(1), weather(2));
        let batch = args.batch.max(1);
        let from_tap = Arc::clone(&tap);
        let socket = match &args.socket {
            Some(path) => Connection::to(path.clone(), args.framing)?,
            None => Connection::inherited()?,
        };
        let reader = socket.descriptor.try_clone()?;
        let lengths = match args.framing {
            Framing::Qemu => Some(Lengths::Be32),
            Framing::Short | Framing::Connect => Some(Lengths::Le16),
            Framing::Vpnkit => {
                vpnkit(File::from(socket.descriptor.try_clone()?))?;
                Some(Lengths::Le16)
            }
            Framing::Unixgram | Framing::UnixgramOpen | Framing::Unixpacket => None,
        };
        let first = match args.framing {
            Framing::Connect => CONNECT,
            _ => &[],
        };
        let writer = socket.descriptor.try_clone()?;
        match lengths {
            Some(lengths) => {
                background("out", move || {
                    stream_out(&from_tap, writer.into(), out_of, batch, lengths, first)
                });
                background("in", move || stream_in(reader.into(), &tap, into, lengths));
            }
            None => {
                // To the system, records are sent and received like datagrams.
                let (writer, reader) = (UnixDatagram::from(writer), UnixDatagram::from(reader));
                let has_end = args.framing == Framing::Unixpacket;
                let to = args.socket.filter(|_| args.framing == Framing::UnixgramOpen);
                background("out", move || {
                    datagrams_out(&from_tap, &writer, to.as_deref(), out_of)
                });
                background("in", move || datagrams_in(&reader, &tap, into, has_end));
            }
        }
        let ended = command(&args.command);
        if let Some(own) = socket.own {
            let _ = std::fs::remove_file(own);
        }
        ended
    }

    /// The way to the network.
    struct Connection {
        descriptor: OwnedFd,
        /// Where this end is bound.
        own: Option<PathBuf>,
    }

    impl Connection {
        fn to(path: PathBuf, framing: Framing) -> Result<Connection> {
            let (descriptor, own) = match framing {
                Framing::Qemu | Framing::Short | Framing::Vpnkit | Framing::Connect => (
                    connect_when_there(|| UnixStream::connect(&path), &path)?.into(),
                    None,
                ),
                Framing::Unixgram => {
                    let own = path.with_extension(format!("guest{}", std::process::id()));
                    let socket = UnixDatagram::bind(&own)?;
                    connect_when_there(|| socket.connect(&path), &path)?;
                    (socket.into(), Some(own))
                }
                Framing::UnixgramOpen => {
                    let own = path.with_extension(format!("guest{}", std::process::id()));
                    let socket = UnixDatagram::bind(&own)?;
                    connect_when_there(|| UnixDatagram::unbound()?.connect(&path), &path)?;
                    (socket.into(), Some(own))
                }
                Framing::Unixpacket => {
                    let none = SockFlag::SOCK_CLOEXEC;
                    let socket = socket::socket(AddressFamily::Unix, SockType::SeqPacket, none, None)?;
                    let address = UnixAddr::new(&path)?;
                    let connect = || Ok(socket::connect(socket.as_raw_fd(), &address)?);
                    connect_when_there(connect, &path)?;
                    (socket, None)
                }
            };
            Ok(Connection { descriptor, own })
        }

        /// The command's standard input is another.
        fn inherited() -> Result<Connection> {
            let descriptor = io::stdin().as_fd().try_clone_to_owned()?;
            nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
            Ok(Connection {
                descriptor,
                own: None,
            })
        }
    }

    /// HyperKit's handshake, as any VM.
    fn vpnkit(mut socket: File) -> Result<()> {
        let mut init = b"VMN3T\x01\0\0\0".to_vec();
        init.resize(49, b'0');
        let command = [
            b"\x01".as_slice(),
            b"00000000-0000-4000-8000-000000000001",
            &[0; 4],
        ]
        .concat();
        socket.write_all(&init)?;
        let mut answer = vec![0; 49];
        socket.read_exact(&mut answer)?;
        socket.write_all(&command)?;
        answer.resize(258, 0);
        socket.read_exact(&mut answer)?;
        if answer[0] == 1 {
            return Ok(());
        }
        Err("the network refuses the handshake".into())
    }

    fn command(words: &[String]) -> Result<ExitCode> {
        let (program, arguments) = words.split_first().ok_or("no command")?;
        let status = Command::new(program)
            .args(arguments)
            .status()
            .map_err(|e| format!("{program}: {e}"))?;
        Ok(ExitCode::from(
            u8::try_from(status.code().unwrap_or(128)).unwrap_or(255),
        ))
    }

    fn ip(words: &[&str]) -> Result<()> {
        let output = Command::new("ip")
            .args(words)
            .output()
            .map_err(|e| format!("ip (package iproute2): {e}"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!(
            "ip {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr)
        )
        .into())
    }

    fn connect_when_there<T>(connect: impl Fn() -> io::Result<T>, socket: &Path) -> Result<T> {
        let began = Instant::now();
        loop {
            match connect() {
                Ok(connected) => return Ok(connected),
                Err(_) if began.elapsed() < Duration::from_secs(10) => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(format!("{}: {error}", socket.display()).into()),
            }
        }
    }

    fn open_tap() -> Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|e| format!("/dev/net/tun: {e}"))?;
        // SAFETY: an ifreq of zeros is one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI)?;
        // SAFETY: TUNSETIFF reads an ifreq, which outlives the call.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
        Ok(file)
    }

    /// Runs one direction; what ends it ends the program, as a guest without its link is of no use. When
    /// the network closes the socket the guest's command is to see a dead link, so that is no error.
    fn background(name: &'static str, work: impl FnOnce() -> io::Result<()> + Send + 'static) {
        std::thread::spawn(move || {
            if let Err(error) = work() {
                eprintln!("vnet-load: link, {name}: {error}");
            }
        });
    }

    fn wait_readable(tap: &File) -> io::Result<()> {
        poll(
            &mut [PollFd::new(tap.as_fd(), PollFlags::POLLIN)],
            PollTimeout::NONE,
        )?;
        Ok(())
    }

    /// How long a frame is, in front of it on a stream.
    #[derive(Debug, Clone, Copy)]
    enum Lengths {
        Be32,
        Le16,
    }

    impl Lengths {
        fn append(self, buffer: &mut Vec<u8>, frame: &[u8]) {
            // The device gives no frame that either could not say.
            match self {
                Lengths::Be32 => {
                    buffer.extend_from_slice(&u32::try_from(frame.len()).unwrap_or_default().to_be_bytes());
                }
                Lengths::Le16 => {
                    buffer.extend_from_slice(&u16::try_from(frame.len()).unwrap_or_default().to_le_bytes());
                }
            }
            buffer.extend_from_slice(frame);
        }

        /// A length and what is behind it, if it is there.
        fn split(self, read: &[u8]) -> Option<(usize, &[u8])> {
            match self {
                Lengths::Be32 => {
                    let (head, rest) = read.split_first_chunk()?;
                    Some((u32::from_be_bytes(*head) as usize, rest))
                }
                Lengths::Le16 => {
                    let (head, rest) = read.split_first_chunk()?;
                    Some((u16::from_le_bytes(*head).into(), rest))
                }
            }
        }
    }

    /// What gvforwarder says, which then waits for no answer.
    const CONNECT: &[u8] = b"POST /connect HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\n\r\n";

    /// `first` leaves with the first frames, in one write.
    fn stream_out(
        tap: &File,
        mut socket: UnixStream,
        mut weather: Weather,
        batch: usize,
        lengths: Lengths,
        first: &[u8],
    ) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(STREAM_BYTES + FRAME_BYTES_MAX);
        let mut head = Some(first);
        let mut frame = vec![0; FRAME_BYTES_MAX];
        loop {
            wait_readable(tap)?;
            buffer.clear();
            buffer.extend_from_slice(head.take().unwrap_or_default());
            let mut frames = 0;
            while frames < batch && buffer.len() < STREAM_BYTES {
                let length = match (&*tap).read(&mut frame) {
                    Ok(length) => length,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e),
                };
                frames += 1;
                weather.pass(&frame[..length], &mut |frame| {
                    lengths.append(&mut buffer, frame);
                    Ok(())
                })?;
            }
            weather.settle(&mut |frame| {
                lengths.append(&mut buffer, frame);
                Ok(())
            })?;
            socket.write_all(&buffer)?;
        }
    }

    fn stream_in(
        mut socket: UnixStream,
        tap: &File,
        mut weather: Weather,
        lengths: Lengths,
    ) -> io::Result<()> {
        let mut buffer = vec![0; STREAM_BYTES];
        let mut end = 0;
        loop {
            let length = socket.read(&mut buffer[end..])?;
            if length == 0 {
                return Ok(());
            }
            end += length;
            let mut start = 0;
            while let Some((length, rest)) = lengths.split(&buffer[start..end]) {
                let head = end - start - rest.len();
                if length > FRAME_BYTES_MAX {
                    return Err(io::Error::other(format!("a frame of {length} bytes")));
                }
                let Some(frame) = rest.get(..length) else { break };
                weather.pass(frame, &mut |frame| into_tap(tap, frame))?;
                start += head + length;
            }
            weather.settle(&mut |frame| into_tap(tap, frame))?;
            buffer.copy_within(start..end, 0);
            end -= start;
        }
    }

    fn datagrams_out(
        tap: &File,
        socket: &UnixDatagram,
        to: Option<&Path>,
        mut weather: Weather,
    ) -> io::Result<()> {
        let mut send = |frame: &[u8]| match to {
            Some(path) => socket.send_to(frame, path).map(drop),
            None => socket.send(frame).map(drop),
        };
        let mut frame = vec![0; FRAME_BYTES_MAX];
        loop {
            match (&*tap).read(&mut frame) {
                Ok(length) => weather.pass(&frame[..length], &mut send)?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    weather.settle(&mut send)?;
                    wait_readable(tap)?;
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn datagrams_in(
        socket: &UnixDatagram,
        tap: &File,
        mut weather: Weather,
        has_end: bool,
    ) -> io::Result<()> {
        let mut frame = vec![0; FRAME_BYTES_MAX];
        loop {
            // Each is waited for alone, so that only losses are acted here.
            let length = socket.recv(&mut frame)?;
            if length == 0 && has_end {
                return Ok(());
            }
            weather.pass(&frame[..length], &mut |frame| into_tap(tap, frame))?;
            weather.settle(&mut |frame| into_tap(tap, frame))?;
        }
    }

    /// A frame that the device refuses is lost, as on a wire.
    fn into_tap(mut tap: &File, frame: &[u8]) -> io::Result<()> {
        let _ = tap.write(frame);
        Ok(())
    }

    /// What becomes of frames on the way: most pass.
    struct Weather {
        loss: u64,
        reorder: u64,
        state: u64,
        /// Late frames, and how many others each waits for.
        late: VecDeque<(Vec<u8>, u8)>,
    }

    impl Weather {
        fn new(loss: u64, reorder: u64, seed: u64) -> Weather {
            Weather {
                loss,
                reorder,
                state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
                late: VecDeque::new(),
            }
        }

        fn pass(
            &mut self,
            frame: &[u8],
            deliver: &mut impl FnMut(&[u8]) -> io::Result<()>,
        ) -> io::Result<()> {
            if self.loss == 0 && self.reorder == 0 {
                return deliver(frame);
            }
            let roll = self.next() % 1000;
            if roll < self.loss {
                return Ok(());
            }
            if roll < self.loss + self.reorder {
                self.late.push_back((frame.to_vec(), 3));
                return Ok(());
            }
            deliver(frame)?;
            for (_, others) in &mut self.late {
                *others = others.saturating_sub(1);
            }
            while self.late.front().is_some_and(|(_, others)| *others == 0) {
                if let Some((frame, _)) = self.late.pop_front() {
                    deliver(&frame)?;
                }
            }
            Ok(())
        }

        /// Nothing else is under way that could overtake.
        fn settle(&mut self, deliver: &mut impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
            while let Some((frame, _)) = self.late.pop_front() {
                deliver(&frame)?;
            }
            Ok(())
        }

        /// xorshift64.
        fn next(&mut self) -> u64 {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            self.state
        }
    }

    // ---- load

    const BACKLOG: u32 = 4096;
    const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

    async fn serve(args: ServeArgs) -> Result<()> {
        raise_limit();
        for port in args.port..args.port.saturating_add(args.ports) {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            let address = SocketAddr::from((args.bind, port));
            socket.bind(address).map_err(|e| format!("{address}: {e}"))?;
            let listener = socket.listen(BACKLOG)?;
            tokio::spawn(async move {
                // Out of descriptors: the next one may be closed by then.
                loop {
                    match listener.accept().await {
                        Ok((stream, _)) => drop(tokio::spawn(echo(stream))),
                        Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                    }
                }
            });
        }
        std::future::pending().await
    }

    async fn echo(mut stream: TcpStream) {
        let mut chunk = [0; 64];
        while let Ok(length @ 1..) = stream.read(&mut chunk).await {
            if stream.write_all(&chunk[..length]).await.is_err() {
                return;
            }
        }
    }

    impl Target {
        /// The destination of the connection with this number.
        fn number(&self, number: usize) -> SocketAddr {
            let address = u32::from(self.to)
                .wrapping_add(u32::try_from(number).unwrap_or_default() % self.addresses.max(1));
            let port = u16::try_from(number % usize::from(self.ports.max(1))).unwrap_or_default();
            SocketAddr::new(IpAddr::V4(address.into()), self.port.saturating_add(port))
        }
    }

    async fn exchange(to: SocketAddr) -> io::Result<TcpStream> {
        let answered = tokio::time::timeout(ANSWER_PATIENCE, async {
            let mut stream = TcpStream::connect(to).await?;
            stream.set_nodelay(true)?;
            stream.write_all(b"x").await?;
            let mut byte = [0];
            stream.read_exact(&mut byte).await?;
            Ok(stream)
        });
        answered
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    async fn connect(args: ConnectArgs) -> Result<()> {
        raise_limit();
        let next = Arc::new(AtomicUsize::new(0));
        let target = Arc::new(args.target);
        let began = Instant::now();
        let until = began + Duration::from_secs_f64(args.secs);
        let workers: Vec<_> = (0..args.parallel)
            .map(|_| {
                let (next, target) = (Arc::clone(&next), Arc::clone(&target));
                tokio::spawn(async move {
                    let (mut took, mut failures, mut last) = (Vec::new(), 0_u64, None);
                    while Instant::now() < until {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= args.count {
                            break;
                        }
                        let to = target.number(number);
                        let began = Instant::now();
                        match exchange(to).await {
                            Ok(_) => took.push(began.elapsed().as_micros()),
                            Err(error) => {
                                failures += 1;
                                last = Some(error.to_string());
                            }
                        }
                    }
                    (took, failures, last)
                })
            })
            .collect();
        let (mut took, mut failures, mut error) = (Vec::new(), 0, None);
        for worker in workers {
            let (some, failed, last) = worker.await?;
            took.extend(some);
            failures += failed;
            error = last.or(error);
        }
        let seconds = began.elapsed().as_secs_f64();
        took.sort_unstable();
        let at = |share: f64| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "an index of a list"
            )]
            let index = ((took.len() as f64 * share) as usize).min(took.len().saturating_sub(1));
            took.get(index).copied().unwrap_or_default() as u64
        };
        println!(
            "{}",
            serde_json::json!({
                "done": took.len(), "fails": failures, "rate": took.len() as f64 / seconds,
                "p50_us": at(0.5), "p99_us": at(0.99), "max_us": at(1.0), "error": error,
            })
        );
        Ok(())
    }

    async fn hold(args: HoldArgs) -> Result<()> {
        raise_limit();
        let began = Instant::now();
        let (mut held, mut error) = (Vec::with_capacity(args.count), None);
        for number in 0..args.count {
            match exchange(args.target.number(number)).await {
                Ok(stream) => held.push(stream),
                Err(e) => {
                    error = Some(e.to_string());
                    break;
                }
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "{}",
            serde_json::json!({ "opened": held.len(), "secs": seconds, "error": error })
        );
        tokio::task::spawn_blocking(|| io::copy(&mut io::stdin(), &mut io::sink())).await??;
        let mut alive = 0;
        for stream in &mut held {
            let mut byte = [0];
            let answered = async {
                stream.write_all(b"x").await?;
                stream.read_exact(&mut byte).await
            };
            alive += usize::from(matches!(
                tokio::time::timeout(ANSWER_PATIENCE, answered).await,
                Ok(Ok(_))
            ));
        }
        println!("{}", serde_json::json!({ "alive": alive }));
        Ok(())
    }

    /// The connections stay half open, by sockets that do not wait, for as long as the command runs.
    fn knock(args: &KnockArgs) -> Result<ExitCode> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};
        raise_limit();
        let mut knocking = Vec::with_capacity(args.count);
        for number in 0..args.count {
            let SocketAddr::V4(to) = args.target.number(number) else {
                continue;
            };
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let one = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
            match connect(one.as_raw_fd(), &SockaddrIn::from(to)) {
                Ok(()) | Err(Errno::EINPROGRESS) => knocking.push(one),
                Err(error) => return Err(format!("{to}: {error}").into()),
            }
        }
        command(&args.command)
    }

    /// As many descriptors as this user may have.
    fn raise_limit() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
        }
    }
}
