//! A running dataplane: from a checked configuration to its end.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::Args;
use crate::capture::file::CaptureFile;
use crate::causes::WithCauses;
use crate::config::{
    Config, ControlplaneUrl, ListenAt, ListenConfig, SearchDomains, Transport, VmConfig, VmSettings,
    default_name,
};
use crate::descriptors::{Descriptors, TooFew, raise_limit};
use crate::egress::resolver::host::{RESOLV_CONF, ResolvConf};
use crate::egress::resolver::{Resolver, ResolverConfig, Upstreams};
use crate::egress::way::{ANYWHERE, has_way};
use crate::engine::discovery::Ipv6Config;
use crate::engine::flow::FLOWS_MAX;
use crate::engine::gateway::dhcp::DhcpConfig;
use crate::engine::gateway::dns::zones::Zones;
use crate::engine::nat::Nat;
use crate::forward::{ForwardError, Forwards};
use crate::front::{self, FrontSender, Tunnels};
use crate::guards::{Guards, HostAddresses, Watcher, follow};
use crate::inherit;
use crate::leases::{LEASE_TIME, LeaseConfig, Leases};
use crate::link::Link;
use crate::link::door::GRACE;
use crate::link::listen::{RecordListener, SocketFile, StreamListener, remedy};
use crate::link::packet::{PacketKind, PacketLink};
use crate::link::stream::{StreamKind, StreamLink, StreamSocket};
use crate::link::vpnkit::Answers;
use crate::link::{serve, shared};
use crate::message::{Report, Router};
use crate::metrics::Metrics;
use crate::network::{GuestSpec, Network, NetworkConfig};
use crate::requests::Requests;
use crate::session::{self, Commands, Controlplane, Identity, SessionConfig, SessionEnd};

/// Reports that wait for the session.
const REPORTS_MAX: usize = 65_536;
/// How long a flow is held before a controlplane has said otherwise.
const HOLD: std::time::Duration = std::time::Duration::from_secs(30);
/// What stands before each line of why a dataplane failed, the last that it writes to stderr.
pub const LAST_WORDS: &str = "vnet-dataplane: ";
/// How long guests and the session may take to end. All of a gvproxy ends within a second, whatever hangs.
const LEAVE_PATIENCE: std::time::Duration = std::time::Duration::from_millis(800);

/// Why a dataplane could not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// An inherited descriptor is not there.
    #[error("descriptor {fd}, named by {flag}, was not inherited")]
    Descriptor {
        /// Which.
        fd: i32,
        /// The flag that names it.
        flag: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// An inherited descriptor is not what its flag is for.
    #[error("descriptor {fd}, named by {flag}, cannot be a guest's (expected {expected})")]
    Socket {
        /// Which.
        fd: i32,
        /// The flag that names it.
        flag: &'static str,
        /// What is.
        expected: &'static str,
        /// Why.
        #[source]
        source: inherit::SocketError,
    },
    /// Standard input and output carry no frames.
    #[error("--listen-stdio: standard input and output cannot be a guest's (expected a pipe or socket each)")]
    Stdio(#[source] io::Error),
    /// A guest socket cannot be opened.
    #[error("{flag} {at} cannot be opened{}", remedy(.source))]
    Listen {
        /// The flag that asks for it.
        flag: &'static str,
        /// Its URL, without parameters.
        at: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The channel to the front is none.
    #[error("--front-fd {fd} cannot be the channel to the front")]
    Front {
        /// Which.
        fd: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A forward cannot be opened.
    #[error("what --publish asks for cannot be forwarded")]
    Forward(#[source] ForwardError),
    /// Too few descriptors.
    #[error(transparent)]
    Descriptors(TooFew),
    /// The host's addresses cannot be followed, so its guards would not hold.
    #[error("the host's addresses cannot be followed")]
    Guards(#[source] io::Error),
    /// The system has no threads, descriptors or random numbers left.
    #[error("the system refuses what a dataplane needs")]
    System(#[source] io::Error),
    /// The session ended for good.
    #[error(transparent)]
    Session(SessionEnd),
}

/// The program `vnet-dataplane`, from its flags to its exit status: 0 done, 1 failed, 2 usage.
pub fn main(args: Args) -> ExitCode {
    start_log();
    let settings = match settings(&args) {
        Ok(settings) => settings,
        Err(error) => return fail(&*error, 1),
    };
    let config = match Config::new(&args, settings, &default_name()) {
        Ok(config) => config,
        Err(problems) => {
            for problem in problems.to_string().lines() {
                say(problem);
            }
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    match runtime.block_on(run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

fn settings(args: &Args) -> Result<VmSettings, Box<dyn std::error::Error>> {
    let Some(fd) = args.vm_settings_fd else {
        return Ok(VmSettings::default());
    };
    let descriptor = take("--vm-settings-fd", fd)?;
    Ok(VmSettings::read(std::fs::File::from(descriptor))?)
}

fn fail(error: &dyn std::error::Error, status: u8) -> ExitCode {
    say(&WithCauses(error).to_string());
    ExitCode::from(status)
}

/// A line of the last words. If nobody can read them, the exit code still says as much.
fn say(text: &str) {
    let _ = io::stderr().write_all(format!("{LAST_WORDS}{text}\n").as_bytes());
}

fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // A log that is set already (by a test) stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // What cannot be written is lost. Its own complaint would be an `eprintln!`, which panics then.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()))
        .try_init();
}

fn take(flag: &'static str, fd: i32) -> Result<OwnedFd, RunError> {
    inherit::take(fd).map_err(|source| RunError::Descriptor { fd, flag, source })
}

/// Runs until a signal, the end of the lifeline, of an inherited link or of standard input, or a refusal of
/// the controlplane. Inherited sockets end it where no other guest can come.
///
/// # Errors
/// [`RunError`].
pub async fn run(config: Config) -> Result<(), RunError> {
    let limit = raise_limit();
    tracing::debug!(limit, "descriptors");
    config.check_descriptors(limit).map_err(RunError::Descriptors)?;
    let descriptors = Descriptors::new(limit);
    // Before anything could be written to where frames are expected.
    let stdio = config.stdio.as_ref().map(|_| inherit::take_stdio());
    let stdio = stdio.transpose().map_err(RunError::Stdio)?;
    let metrics = Arc::new(Metrics::default());
    let lifeline = config
        .exit_with_fd
        .map(|fd| take("--exit-with-fd", fd))
        .transpose()?;
    let ready = config.ready_fd.map(|fd| take("--ready-fd", fd)).transpose()?;
    let controlplane = match &config.controlplane {
        ControlplaneUrl::Unix(path) => Controlplane::Unix(path.clone()),
        ControlplaneUrl::Fd(fd) => Controlplane::Inherited(take("--controlplane", *fd)?.into()),
    };

    // The watch begins before the first look, so that no change falls in between.
    let watcher = Watcher::open().map_err(RunError::Guards)?;
    let host = HostAddresses::enumerate().map_err(RunError::Guards)?;
    let guards = Arc::new(Guards::new(host, config.closed.iter().copied()));
    guards.set_ipv6(has_way(ANYWHERE));

    let (reports, receiver) = mpsc::channel(REPORTS_MAX);
    let network = make_network(
        &config,
        Arc::clone(&guards),
        descriptors.clone(),
        Arc::clone(&metrics),
        reports.clone(),
    );
    let capture_file = match config.pcap_fd {
        None => None,
        Some(fd) => {
            let file = File::from(take("--pcap-fd", fd)?);
            let file = CaptureFile::start(file, config.pcap_limit_bytes).map_err(RunError::System)?;
            network.capture_all(Arc::clone(file.capture()));
            Some(file)
        }
    };
    let tunnels = Tunnels::new(
        Arc::clone(&network) as Arc<dyn Router>,
        Arc::clone(&metrics),
        &descriptors,
    );
    let front = match config.front_fd {
        None => None,
        Some(fd) => Some(open_front(&config, fd, &network, tunnels.clone(), &metrics)?),
    };
    let forwards = Forwards::new(
        Arc::clone(&network) as Arc<dyn Router>,
        Arc::clone(&metrics),
        descriptors.clone(),
        tokio::runtime::Handle::current(),
    );
    network.set_forwards(forwards.clone());
    let _closing = Closing(forwards.clone());

    let mut boot_id = [0; 16];
    getrandom::fill(&mut boot_id).map_err(|e| RunError::System(io::Error::other(e.to_string())))?;
    let session = session::run(
        SessionConfig {
            controlplane,
            identity: Identity {
                dataplane: config.name.clone(),
                boot_id,
                network: config.network.name.clone(),
                subnet: config.network.subnet,
                subnet_ipv6: config.network.ipv6,
                gateway: config.network.gateway,
                host_alias: config
                    .network
                    .host_alias
                    .filter(|a| config.network.is_loopback(*a)),
                nat: config.network.other_nat(),
            },
            guards: Arc::clone(&guards),
            metrics: Arc::clone(&metrics),
        },
        receiver,
        Arc::clone(&network) as Arc<dyn Router>,
        Commands {
            forwards: forwards.clone(),
            zones: Arc::clone(&network) as Arc<dyn session::Zones>,
            captures: Arc::clone(&network) as Arc<dyn session::Captures>,
        },
    );
    let follow = follow(
        watcher,
        Arc::clone(&guards),
        Arc::clone(&metrics),
        reports.clone(),
        Arc::clone(&network) as Arc<dyn Router>,
    );

    forwards
        .expose(config.forwards.clone())
        .map_err(RunError::Forward)?;
    let asked = Asked {
        tunnels,
        front,
        descriptors: &descriptors,
        sockets: config
            .listeners
            .iter()
            .filter(|listener| listener.transport == Transport::Connect)
            .count(),
        metrics: &metrics,
    };
    let files = open_listeners(&config, &network, &guards, &asked)?;
    let links_gone = open_links(&config, &network, stdio)?;

    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::System)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::System)?;
    tracing::info!(dataplane = %config.name, "ready");
    if let Some(ready) = ready {
        // Who does not read it any more has no use for it.
        let _ = std::fs::File::from(ready).write_all(b"ready\n");
    }
    let mut session = std::pin::pin!(session);
    let session_end = tokio::select! {
        end = &mut session => Some(end),
        result = follow => {
            // Stale guards would open the host's new addresses.
            return result.map_err(RunError::Guards);
        }
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        () = lifeline_end(lifeline) => None,
        () = links_gone => None,
    };
    // No new guests; those there are end and say so, and the session ends behind the last of them.
    drop(files);
    forwards.close();
    network.stop();
    let session_end = match session_end {
        Some(end) => end,
        None => {
            let leave = async {
                // It cannot be closed: the session is still polled here.
                let _ = reports.send(Report::End).await;
                std::future::pending().await
            };
            tokio::select! {
                end = session => end,
                () = leave => SessionEnd::Finished,
                () = tokio::time::sleep(LEAVE_PATIENCE) => SessionEnd::Finished,
            }
        }
    };
    // Behind the guests' last frames.
    if let Some(file) = capture_file {
        file.finish().await;
    }
    for line in metrics.render().lines().filter(|line| !line.starts_with('#')) {
        tracing::debug!(metric = line, "counted");
    }
    match session_end {
        SessionEnd::Finished => Ok(()),
        end => Err(RunError::Session(end)),
    }
}

/// Closes the forwards however the dataplane ends, so that no file of a socket stays behind.
struct Closing(Forwards);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Hears and tells the front from now on.
fn open_front(
    config: &Config,
    fd: i32,
    network: &Network,
    tunnels: Tunnels,
    metrics: &Arc<Metrics>,
) -> Result<FrontSender, RunError> {
    let (sender, receiver) = front::open(take("--front-fd", fd)?, Arc::clone(metrics))
        .map_err(|source| RunError::Front { fd, source })?;
    tokio::spawn(tunnels.serve(receiver));
    if config.guest_api {
        network.offer_guest_api(sender.clone());
    }
    Ok(sender)
}

async fn lifeline_end(lifeline: Option<OwnedFd>) {
    match lifeline {
        Some(lifeline) => {
            if let Err(error) = inherit::closed(lifeline).await {
                tracing::warn!(%error, "the lifeline cannot be followed; ending");
            }
        }
        None => std::future::pending().await,
    }
}

fn make_network(
    config: &Config,
    guards: Arc<Guards>,
    descriptors: Descriptors,
    metrics: Arc<Metrics>,
    reports: mpsc::Sender<Report>,
) -> Arc<Network> {
    let net = &config.network;
    let mut zones = Zones::new();
    for zone in &net.zones {
        if let Err(error) = zones.set(zone.clone()) {
            tracing::warn!(%error, zone = zone.text(), "zone left out");
        }
    }
    let leases = Leases::new(LeaseConfig {
        subnet: net.subnet,
        reserved: std::iter::once(net.gateway).chain(net.answered()).collect(),
        first: Some(net.first_guest),
        fixed: net.static_leases.iter().copied().collect(),
        lease_time: LEASE_TIME,
    });
    let (search, follow_search) = match &net.search {
        SearchDomains::These(domains) => (domains.clone(), None),
        SearchDomains::Host => (
            Vec::new(),
            Some(Arc::new(Mutex::new(ResolvConf::new(PathBuf::from(RESOLV_CONF))))),
        ),
    };
    let ipv6 = net.ipv6.map(|prefix| Ipv6Config::new(prefix, search.clone()));
    let resolver = Resolver::new(ResolverConfig {
        upstreams: if net.resolvers.is_empty() {
            Upstreams::Host(PathBuf::from(RESOLV_CONF))
        } else {
            Upstreams::Fixed(net.resolvers.clone())
        },
        never: std::iter::once(net.gateway.into())
            .chain(ipv6.iter().map(|i| i.gateway.into()))
            .collect(),
        in_flight_max: crate::egress::resolver::IN_FLIGHT_MAX,
        total_time: crate::egress::resolver::TOTAL_TIME,
    });
    let shared = NetworkConfig {
        gateway: net.gateway,
        gateway_mac: net.gateway_mac,
        subnet: net.subnet,
        nat: Arc::new(Nat::new(
            net.nat.iter().map(|(from, to)| (*from, *to)),
            net.answered(),
        )),
        ipv6,
        mtu_bytes: net.mtu_bytes.into(),
        dhcp: DhcpConfig {
            gateway: net.gateway,
            subnet: net.subnet,
            dns: vec![net.gateway],
            mtu_bytes: net.mtu_bytes,
            search_domains: search,
            lease_time: LEASE_TIME,
        },
        follow_search,
        hold: HOLD,
        grace: GRACE,
        flows_max: FLOWS_MAX,
        descriptors,
        metrics,
    };
    Network::new(
        shared,
        leases,
        zones,
        guards,
        resolver,
        tokio::runtime::Handle::current(),
        reports,
    )
}

fn open_listeners(
    config: &Config,
    network: &Arc<Network>,
    guards: &Guards,
    asked: &Asked<'_>,
) -> Result<Vec<SocketFile>, RunError> {
    let mut files = Vec::new();
    for listener in &config.listeners {
        if matches!(listener.at, ListenAt::Fd(_)) {
            continue;
        }
        files.extend(
            open_listener(config, listener, network, guards, asked).map_err(|source| RunError::Listen {
                flag: listener.transport.flag(),
                at: listener.url(),
                source,
            })?,
        );
        tracing::info!(at = %listener.at, transport = listener.transport.word(), "waiting for VMs");
    }
    Ok(files)
}

fn open_listener(
    config: &Config,
    listener: &ListenConfig,
    network: &Arc<Network>,
    guards: &Guards,
    asked: &Asked<'_>,
) -> io::Result<Option<SocketFile>> {
    let mut spec = guest_spec(&listener.vm);
    let path = || match &listener.at {
        ListenAt::Unix(path) => Ok(path),
        // The configuration has no such thing.
        _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
    };
    match listener.transport {
        Transport::Vfkit => shared::datagrams(network, path()?, spec).map(Some),
        Transport::Bess => {
            let (listener, file) = RecordListener::open(path()?)?;
            serve::records(network, listener, spec)?;
            Ok(Some(file))
        }
        transport @ (Transport::Qemu | Transport::Vpnkit | Transport::Connect) => {
            let (stream, file) = StreamListener::open(&listener.at)?;
            if let Some(address) = stream.tcp_address() {
                // Where it really listens, port 0 replaced: closed to guests.
                guards.add_listener(address);
            }
            match transport {
                Transport::Connect => {
                    // It carries requests too, so whatever reaches it may become a guest.
                    spec.without_kept = config.has_hypervisors();
                    let url = listener.url();
                    asked
                        .requests(url, serve::Entrance::new(network, spec))
                        .serve(stream)?;
                }
                Transport::Vpnkit => {
                    let answers = Answers {
                        macs: config.vpnkit_macs.clone(),
                        mtu_bytes: config.network.mtu_bytes,
                        ..Answers::default()
                    };
                    serve::vpnkit(network, stream, spec, answers)?;
                }
                _ => serve::streams(network, stream, spec)?,
            }
            Ok(file)
        }
    }
}

/// What requests on `--listen` are served with.
struct Asked<'a> {
    tunnels: Tunnels,
    front: Option<FrontSender>,
    descriptors: &'a Descriptors,
    /// How many sockets there are.
    sockets: usize,
    metrics: &'a Arc<Metrics>,
}

impl Asked<'_> {
    fn requests(&self, listen: String, entrance: Arc<serve::Entrance>) -> Requests {
        Requests::new(
            listen,
            Box::new(entrance),
            self.tunnels.clone(),
            self.front.clone(),
            self.descriptors,
            self.sockets,
            Arc::clone(self.metrics),
        )
    }
}

/// Which of the links that were inherited is gone.
enum Gone {
    /// One with which the dataplane ends.
    Last,
    /// One of the connected sockets.
    Socket,
}

/// Attaches the guests whose links were inherited; what returns when the dataplane is to end for it.
fn open_links(
    config: &Config,
    network: &Arc<Network>,
    stdio: Option<(OwnedFd, OwnedFd)>,
) -> Result<impl Future<Output = ()> + use<>, RunError> {
    let (gone, mut is_gone) = mpsc::unbounded_channel();
    let attach = |link: Link, vm: &VmConfig, end: Gone| {
        let gone = gone.clone();
        let then = move || {
            // Nobody waits any more when the dataplane ends first.
            let _ = gone.send(end);
        };
        network
            .attach_then(link, guest_spec(vm), None, then)
            .map(drop)
            .map_err(RunError::System)
    };
    if let Some((fd, vm)) = &config.link {
        let link = PacketLink::new(take("--link-fd", *fd)?, PacketKind::Tap).map_err(RunError::System)?;
        attach(Link::Packet(link), vm, Gone::Last)?;
    }
    if let (Some((input, output)), Some(vm)) = (stdio, &config.stdio) {
        let link = StreamLink::pair(input, output, StreamKind::Stdio).map_err(RunError::Stdio)?;
        attach(Link::Stream(link), vm, Gone::Last)?;
    }
    let mut sockets = 0;
    for listener in &config.listeners {
        if let ListenAt::Fd(fd) = listener.at {
            attach(open_socket(listener.transport, fd)?, &listener.vm, Gone::Socket)?;
            sockets += 1;
        }
    }
    let others_may_come = sockets < config.listeners.len() || config.link.is_some() || config.stdio.is_some();
    Ok(async move {
        while let Some(end) = is_gone.recv().await {
            match end {
                Gone::Last => return,
                Gone::Socket => {
                    sockets -= 1;
                    if sockets == 0 && !others_may_come {
                        return;
                    }
                }
            }
        }
        // Nothing was inherited.
        std::future::pending().await
    })
}

/// The link over an inherited socket.
fn open_socket(transport: Transport, fd: i32) -> Result<Link, RunError> {
    let flag = transport.flag();
    if !inherit::is_inherited(fd) {
        return Err(RunError::Descriptor {
            fd,
            flag,
            source: io::Error::from_raw_os_error(libc::EBADF),
        });
    }
    let (kind, expected) = match transport {
        Transport::Qemu | Transport::Vpnkit | Transport::Connect => {
            (socket2::Type::STREAM, "a connected stream socket")
        }
        Transport::Vfkit => (socket2::Type::DGRAM, "a connected datagram socket"),
        Transport::Bess => (
            socket2::Type::SEQPACKET,
            "a connected socket of sequenced packets",
        ),
    };
    let descriptor = take(flag, fd)?;
    inherit::check_socket(&descriptor, kind).map_err(|source| RunError::Socket {
        fd,
        flag,
        expected,
        source,
    })?;
    let packets = |kind| move |descriptor| PacketLink::new(descriptor, kind).map(Link::Packet);
    match transport {
        Transport::Vfkit => packets(PacketKind::Datagrams)(descriptor),
        Transport::Bess => packets(PacketKind::Records)(descriptor),
        Transport::Qemu | Transport::Vpnkit | Transport::Connect => {
            let socket = StreamSocket::from(socket2::Socket::from(descriptor));
            StreamLink::new(socket, StreamKind::Qemu, &[]).map(Link::Stream)
        }
    }
    .map_err(RunError::System)
}

fn guest_spec(vm: &VmConfig) -> GuestSpec {
    GuestSpec {
        name: vm.name.clone(),
        labels: vm.labels.clone(),
        own_policy: vm.own_policy.clone(),
        mode: vm.mode,
        ec2_metadata_access: vm.ec2_metadata_access,
        resolver_patience: vm.resolver_patience,
        pinned_mac: vm.mac,
        pinned_address: vm.address,
        without_kept: false,
    }
}
