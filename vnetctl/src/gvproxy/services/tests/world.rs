//! A controlplane in this process, at sockets of its own, and dataplanes that are a script.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Endpoint, Uri};
use vnet_proto::v1;
use vnet_proto::v1::command::Command;
use vnet_proto::v1::session_request::Message;
use vnet_proto::v1::session_response::Message as Told;

use super::super::*;
use crate::client::Server;

pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);

/// The controlplane. It ends when this is dropped.
pub(super) struct World {
    directory: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl World {
    pub(super) async fn start() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("vnet-gv-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let at = |name: &str| vnet_controlplane::config::Endpoint::Unix(directory.join(name));
        let config = vnet_controlplane::Config {
            listen: vec![at("control.sock")],
            session_listen: vec![at("session.sock")],
            store: vnet_controlplane::store::Location::Memory,
            history: None,
            network_policy: None,
            secure_mode: false,
            idle_exit: None,
            if_absent: false,
            log_level: String::new(),
        };
        let task = tokio::spawn(async move {
            vnet_controlplane::run(config).await.unwrap();
        });
        let world = Self { directory, task };
        for name in ["control.sock", "session.sock"] {
            while UnixStream::connect(world.directory.join(name)).await.is_err() {
                assert!(!world.task.is_finished(), "the controlplane ended");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        world
    }

    pub(super) fn connection(&self) -> Connection {
        Connection {
            named: Some(Server::Unix(self.directory.join("control.sock"))),
        }
    }

    /// Services of a network, without a policy and without tunnels.
    pub(super) fn config(&self, network: &str) -> ServicesConfig {
        let policy_in_force = policy_in_force(self.connection(), network.to_owned(), false);
        ServicesConfig {
            policy_in_force,
            ..config(self.connection(), network)
        }
    }

    pub(super) fn services(&self, network: &str) -> Arc<Services> {
        Services::new(self.config(network))
    }

    /// A dataplane of a network, with one VM of the network's name.
    pub(super) async fn dataplane(&self, network: &str, mode: v1::Mode) -> Dataplane {
        self.dataplane_of(network, network, mode).await
    }

    /// A dataplane of a network, with one VM.
    pub(super) async fn dataplane_of(&self, network: &str, vm: &str, mode: v1::Mode) -> Dataplane {
        let path = self.directory.join("session.sock");
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://controlplane.vnet.internal");
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        let mut client = v1::dataplane_service_client::DataplaneServiceClient::new(channel);
        let (say, said) = mpsc::channel(64);
        let hello = hello(network, vm, mode);
        say.send(request(Message::Hello(hello))).await.unwrap();
        let answer = client.session(ReceiverStream::new(said)).await.unwrap();
        let mut told = answer.into_inner();
        let (tell, verdicts) = mpsc::unbounded_channel();
        let dataplane = Dataplane {
            say: say.clone(),
            verdicts,
            busy: Arc::default(),
            misses: 0,
        };
        let busy = Arc::clone(&dataplane.busy);
        let (welcomed, welcome) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            let mut welcomed = Some(welcomed);
            let zones = Mutex::default();
            while let Ok(Some(response)) = told.message().await {
                let answer = match response.message {
                    Some(Told::Welcome(_)) => {
                        let _ = welcomed.take().unwrap().send(());
                        continue;
                    }
                    Some(Told::Heartbeat(beat)) => Message::Heartbeat(beat),
                    Some(Told::Revoke(revoke)) => acknowledge(revoke.command_id),
                    Some(Told::Cut(cut)) => acknowledge(cut.command_id),
                    Some(Told::Command(command)) => obey(command, &busy, &zones),
                    Some(Told::Verdict(verdict)) => {
                        let _ = tell.send(verdict);
                        continue;
                    }
                    _ => continue,
                };
                if say.send(request(answer)).await.is_err() {
                    return;
                }
            }
        });
        welcome.await.unwrap();
        dataplane
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Services without a policy and without tunnels.
pub(super) fn config(connection: Connection, network: &str) -> ServicesConfig {
    ServicesConfig {
        connection,
        network: network.to_owned(),
        gateway_ip: GATEWAY,
        gateway_mac: Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]),
        static_leases: BTreeMap::from([(
            Ipv4Addr::new(192, 168, 127, 9),
            Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0x09]),
        )]),
        guests: None,
        policy_in_force: always(false),
        tunnels: Arc::new(NoTunnels),
        ssh: Arc::new(NoTunnels),
    }
}

/// The same answer each time.
pub(super) fn always(answer: bool) -> Question {
    Arc::new(move || Box::pin(async move { Ok(answer) }))
}

/// What a test sets.
pub(super) fn as_set(answer: &Arc<AtomicBool>) -> Question {
    let answer = Arc::clone(answer);
    Arc::new(move || {
        let answer = answer.load(Ordering::SeqCst);
        Box::pin(async move { Ok(answer) })
    })
}

/// Where nobody answers.
pub(super) fn nowhere() -> Connection {
    Connection {
        named: Some(Server::Unix(PathBuf::from("/nonexistent/vnet.sock"))),
    }
}

/// A controlplane that is stopped: it takes connections, and says nothing. Those that wait for it hear when it ends.
pub(super) struct Stopped {
    path: PathBuf,
    _listener: std::os::unix::net::UnixListener,
}

impl Stopped {
    pub(super) fn start() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vnet-stopped-{}-{number}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        Self {
            path,
            _listener: listener,
        }
    }

    pub(super) fn connection(&self) -> Connection {
        Connection {
            named: Some(Server::Unix(self.path.clone())),
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A dataplane that does what it is told.
pub(super) struct Dataplane {
    say: mpsc::Sender<v1::SessionRequest>,
    pub(super) verdicts: mpsc::UnboundedReceiver<v1::Verdict>,
    /// Where something listens already.
    busy: Arc<Mutex<HashSet<String>>>,
    misses: u64,
}

impl Dataplane {
    /// Something else listens there.
    pub(super) fn is_busy(&self, listen: &str) {
        let mut busy = self.busy.lock().unwrap();
        busy.extend(["tcp", "udp"].map(|protocol| format!("{protocol} {listen}")));
    }

    pub(super) async fn say(&self, message: Message) {
        self.say.send(request(message)).await.unwrap();
    }

    /// The VM wants to open a flow, as `192.0.2.1:443`.
    pub(super) async fn miss_flow(&mut self, to: &str) {
        let to: std::net::SocketAddrV4 = to.parse().unwrap();
        let subject = v1::FlowSubject {
            protocol: v1::Protocol::Tcp.into(),
            guest_address: vec![192, 168, 127, 2],
            guest_port: 40_000,
            address: to.ip().octets().to_vec(),
            port: to.port().into(),
            ..Default::default()
        };
        self.miss(v1::miss::Subject::Flow(subject)).await;
    }

    /// The VM wants to look up a name's address.
    pub(super) async fn miss_lookup(&mut self, name: &str) {
        let subject = v1::LookupSubject {
            name: name.to_owned(),
            query_type: 1,
            ..Default::default()
        };
        self.miss(v1::miss::Subject::Lookup(subject)).await;
    }

    async fn miss(&mut self, subject: v1::miss::Subject) {
        self.misses += 1;
        let hold = prost_types::Duration {
            seconds: 30,
            nanos: 0,
        };
        self.say(Message::Miss(v1::Miss {
            miss_id: self.misses,
            vm: 1,
            subject: Some(subject),
            hold: Some(hold),
            held: 1,
            ..Default::default()
        }))
        .await;
    }
}

fn hello(network: &str, vm: &str, mode: v1::Mode) -> v1::Hello {
    let vm = v1::VmUp {
        vm: 1,
        name: vm.to_owned(),
        attached: true,
        mode: mode.into(),
        addresses: vec!["192.168.127.2".to_owned(), "fd00::2".to_owned()],
        mac: "5a:94:ef:e4:0c:ee".to_owned(),
        ..Default::default()
    };
    let number = network.bytes().fold(0u8, u8::wrapping_add);
    v1::Hello {
        protocol_version: 1,
        dataplane: format!("dataplane of {network}"),
        boot_id: vec![number; 16],
        network: network.to_owned(),
        subnet: "192.168.127.0/24".to_owned(),
        gateway: GATEWAY.to_string(),
        host_alias: "192.168.127.254".to_owned(),
        vms: vec![vm],
        ..Default::default()
    }
}

fn request(message: Message) -> v1::SessionRequest {
    v1::SessionRequest {
        message: Some(message),
    }
}

fn acknowledge(command_id: u64) -> Message {
    Message::Ack(v1::Ack {
        command_id,
        ..Default::default()
    })
}

fn obey(command: v1::Command, busy: &Mutex<HashSet<String>>, zones: &Mutex<Vec<v1::Zone>>) -> Message {
    let mut ack = v1::Ack {
        command_id: command.command_id,
        ..Default::default()
    };
    match command.command {
        Some(Command::Expose(mut forward)) => {
            let any = forward.listen.strip_suffix(":0").map(str::to_owned);
            if let Some(address) = any {
                forward.listen = format!("{address}:40000");
            }
            let protocol = protocol_of(&forward);
            if forward.listen.starts_with("192.0.2.77:") {
                ack.error = Some(v1::CommandError {
                    code: 3,
                    text: "this host is elsewhere".to_owned(),
                    listen_error: Some(v1::ListenError {
                        problem: v1::ListenProblem::NoSuchAddress.into(),
                        listen: forward.listen,
                        by_own_forward: false,
                    }),
                });
            } else if busy
                .lock()
                .unwrap()
                .insert(format!("{protocol} {}", forward.listen))
            {
                ack.forward = Some(forward);
            } else {
                let listen = &forward.listen;
                ack.error = Some(v1::CommandError {
                    code: 6,
                    text: format!("{protocol} {listen} is taken by nginx (pid 1234)"),
                    listen_error: Some(v1::ListenError {
                        problem: v1::ListenProblem::InUse.into(),
                        listen: listen.clone(),
                        by_own_forward: false,
                    }),
                });
            }
        }
        Some(Command::Unexpose(forward)) => {
            let place = format!("{} {}", protocol_of(&forward), forward.listen);
            busy.lock().unwrap().remove(&place);
            ack.forward = Some(forward);
        }
        Some(Command::SetZone(zone)) => {
            let mut zones = zones.lock().unwrap();
            zones.retain(|there| there.name != zone.name);
            zones.push(zone.clone());
            ack.zone = Some(zone);
        }
        Some(Command::MergeZone(mut zone)) => {
            let mut zones = zones.lock().unwrap();
            if let Some(there) = zones.iter_mut().find(|there| there.name == zone.name) {
                zone.records.append(&mut there.records);
                *there = zone.clone();
            } else {
                zones.push(zone.clone());
            }
            ack.zone = Some(zone);
        }
        Some(Command::RemoveRecords(wanted)) => {
            let mut zones = zones.lock().unwrap();
            let there = zones.iter_mut().find(|there| there.name == wanted.name).unwrap();
            let before = there.records.len();
            let is_wanted = |record: &v1::ZoneRecord| {
                wanted.records.iter().any(|w| {
                    w.name == record.name
                        && w.regexp == record.regexp
                        && (w.address.is_empty() || w.address == record.address)
                })
            };
            there.records.retain(|record| !is_wanted(record));
            if there.records.len() == before {
                ack.error = Some(v1::CommandError {
                    code: 5,
                    text: format!("zone {} has no such record", wanted.name),
                    ..Default::default()
                });
            } else {
                ack.zone = Some(there.clone());
            }
        }
        Some(Command::DeleteZone(zone)) => zones.lock().unwrap().retain(|there| there.name != zone.name),
        _ => {}
    }
    Message::Ack(ack)
}

fn protocol_of(forward: &v1::Forward) -> &'static str {
    match forward.protocol() {
        v1::Protocol::Udp => "udp",
        _ => "tcp",
    }
}
