//! Guests whose hypervisor closes its socket and dials again, over every socket on which that can be, and those who
//! are none of these.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::egress::stream::HostStream;
use crate::link::door::UNDECIDED_MAX;
use crate::link::listen::Cid;
use crate::message::{FlowEnd, Ingress, Input, Order, Origin, Router as _, Settings, Waiting};
use crate::requests::Entrance as _;

/// Longer than any of these tests.
const LONG: Duration = Duration::from_secs(60);
/// Long enough for whatever is to happen at once.
const MOMENT: Duration = Duration::from_secs(3);

/// A hypervisor's end of a new link, over which this frame has gone already.
type Dial = Box<dyn Fn(&[u8]) -> Box<dyn Wire>>;

fn kept(name: &str, grace: Duration) -> Rig {
    Rig::with(name, 1500, grace)
}

/// Each kind of socket that hypervisors dial, and how.
fn sockets(rig: &Rig) -> Vec<(&'static str, Dial, Vec<SocketFile>)> {
    let at = |name: &str| StreamListener::open(&ListenAt::Unix(rig.path(name))).unwrap();
    let dial = |name: &str| {
        let path = rig.path(name);
        move || UnixStream::connect(&path).unwrap()
    };
    let mut all: Vec<(&'static str, Dial, Vec<SocketFile>)> = Vec::new();

    let qemu = dial("qemu");
    all.push((
        "qemu",
        Box::new(move |first| {
            let mut wire = Stream::new(qemu(), StreamKind::Qemu);
            wire.send(first);
            Box::new(wire)
        }),
        vec![rig.streams("qemu")],
    ));

    let entrance = Entrance::new(&rig.network, spec());
    all.push((
        "connect",
        Box::new(move |first| {
            // The first frame was read with the request.
            let (here, there) = UnixStream::pair().unwrap();
            let wire = Stream::new(there, StreamKind::Connect);
            entrance.attach(HostStream::from(here), None, &wire.frame(first));
            Box::new(wire)
        }),
        Vec::new(),
    ));

    let (listener, file) = at("vpnkit");
    let answers = Answers {
        mtu_bytes: 1500,
        ..Answers::default()
    };
    serve::vpnkit(&rig.network, listener, spec(), answers).unwrap();
    let vpnkit = dial("vpnkit");
    all.push((
        "vpnkit",
        Box::new(move |first| {
            let mut client = vpnkit();
            client
                .write_all(&handshake("00000000-0000-4000-8000-000000000001"))
                .unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.read_exact(&mut [0; 49 + 258]).unwrap();
            let mut wire = Stream::new(client, StreamKind::Vpnkit);
            wire.send(first);
            Box::new(wire)
        }),
        file.into_iter().collect(),
    ));

    #[cfg(target_os = "linux")]
    {
        let (listener, file) = super::super::listen::RecordListener::open(&rig.path("bess")).unwrap();
        serve::records(&rig.network, listener, spec()).unwrap();
        let path = rig.path("bess");
        all.push((
            "bess",
            Box::new(move |first| {
                let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
                socket.connect(&SockAddr::unix(&path).unwrap()).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut wire = Packets(socket);
                wire.send(first);
                Box::new(wire)
            }),
            vec![file],
        ));
    }
    all
}

/// QEMU's socket alone.
fn qemu(rig: &Rig) -> (Dial, SocketFile) {
    let (_, dial, mut files) = sockets(rig).swap_remove(0);
    (dial, files.remove(0))
}

/// A guest that has been let in, and so told of.
fn answered(dial: &Dial, number: u8) -> Box<dyn Wire> {
    let mut wire = dial(&asker(number).question());
    asker(number).is_answered(&mut *wire);
    wire
}

/// A connection from the host into a guest, and the guest's end of it.
struct Talk {
    host: UnixStream,
    asker: Asker,
    /// Ports: the gateway's, the guest's.
    ports: [u8; 4],
    sequence: u32,
    expected: u32,
    heard: Vec<u8>,
}

const SYN: u8 = 2;
const ACK: u8 = 16;

impl Talk {
    fn open(rig: &Rig, asker: Asker, wire: &mut dyn Wire) -> Self {
        let address = IpAddr::V4(asker.address);
        let until = Instant::now() + PATIENCE;
        let vm = loop {
            match rig.network.guest_at(address) {
                Some(vm) => break vm,
                None => assert!(Instant::now() < until, "it has no address"),
            }
        };
        let (host, there) = UnixStream::pair().unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        let ingress = Ingress {
            stream: HostStream::from(there),
            early: Vec::new(),
            target: SocketAddr::new(address, 80),
            client: None,
            origin: Origin::Tunnel,
            waiting: Waiting::enter(&Arc::new(AtomicUsize::new(0)), 1).unwrap(),
        };
        assert!(rig.network.send(vm, Input::Ingress(ingress)));
        let mut talk = Self {
            host,
            asker,
            ports: [0; 4],
            sequence: 7_000,
            expected: 0,
            heard: Vec::new(),
        };
        let (flags, sequence, _) = talk.segment(wire);
        assert_eq!(flags & SYN, SYN);
        talk.expected = sequence.wrapping_add(1);
        talk.send(wire, SYN | ACK, &[]);
        talk.sequence += 1;
        talk
    }

    /// The next segment to the guest: flags, sequence number, payload.
    fn segment(&mut self, wire: &mut dyn Wire) -> (u8, u32, Vec<u8>) {
        loop {
            let frame = wire.receive();
            if frame[12..14] != [8, 0] || frame[23] != 6 {
                continue;
            }
            let tcp = &frame[34..14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]))];
            self.ports = [tcp[2], tcp[3], tcp[0], tcp[1]];
            let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
            return (tcp[13], sequence, tcp[usize::from(tcp[12] >> 4) * 4..].to_vec());
        }
    }

    fn send(&self, wire: &mut dyn Wire, flags: u8, payload: &[u8]) {
        let total = u16::try_from(40 + payload.len()).unwrap().to_be_bytes();
        let mut frame = Vec::new();
        frame.extend([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
        frame.extend(self.asker.mac.0);
        frame.extend([8, 0, 0x45, 0, total[0], total[1], 0, 1, 0, 0, 64, 6, 0, 0]);
        frame.extend(self.asker.address.octets());
        frame.extend(GATEWAY);
        frame.extend(self.ports);
        frame.extend(self.sequence.to_be_bytes());
        frame.extend(self.expected.to_be_bytes());
        frame.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        frame.extend(payload);
        wire.send(&frame);
    }

    /// The guest reads until it has heard so much in all, and acknowledges.
    fn hear(&mut self, wire: &mut dyn Wire, bytes: usize) {
        while self.heard.len() < bytes {
            let (_, sequence, payload) = self.segment(wire);
            if sequence == self.expected {
                self.expected = self.expected.wrapping_add(u32::try_from(payload.len()).unwrap());
                self.heard.extend(payload);
            }
            self.send(wire, ACK, &[]);
        }
    }

    /// The guest says something, and the host hears it.
    fn say(&mut self, wire: &mut dyn Wire, words: &[u8]) {
        self.send(wire, ACK, words);
        self.sequence += u32::try_from(words.len()).unwrap();
        let mut heard = vec![0; words.len()];
        self.host.read_exact(&mut heard).unwrap();
        assert_eq!(heard, words);
    }

    fn is_over(&mut self) {
        assert!(is_closed(&mut self.host));
    }
}

impl Rig {
    /// The guests that are there come under no policy and no mode.
    fn open_all(&self) {
        let settings = Settings {
            switch_open: true,
            ..Settings::unsaid("web".to_owned(), LONG, LONG)
        };
        self.network.broadcast(&Order::Settings(settings));
    }

    /// Waits until the session has heard that a guest's link is there, or not.
    fn attached(&mut self, attached: bool) {
        self.report(|report| match report {
            Report::VmStatus(status) => (status.attached == attached).then_some(()),
            Report::VmDown { .. } => panic!("it is gone"),
            _ => None,
        });
    }

    /// Ends the guests; who was said to have come and gone since this was last asked.
    fn comings(&mut self) -> Vec<String> {
        let mut comings = Vec::new();
        while let Ok(report) = self.reports.try_recv() {
            match report {
                Report::VmUp(up) => comings.push(format!("up {}", up.name)),
                Report::VmDown { link_error, .. } => {
                    comings.push(link_error.map_or("down".to_owned(), |error| format!("down: {error}")));
                }
                Report::FlowClosed { end, .. } => comings.push(format!("closed {end:?}")),
                _ => {}
            }
        }
        comings
    }
}

#[test]
fn the_same_guest_over_a_new_link_keeps_its_connections_and_its_name() {
    let mut rig = kept("same", LONG);
    for (number, (word, dial, _files)) in (2..).zip(sockets(&rig)) {
        let asker = asker(number);
        let mut wire = dial(&asker.question());
        assert_eq!(rig.next_up(), ("web".to_owned(), word));
        asker.is_answered(&mut *wire);
        let mut talk = Talk::open(&rig, asker, &mut *wire);
        talk.host.write_all(b"before").unwrap();
        talk.hear(&mut *wire, 6);
        talk.say(&mut *wire, b"from the guest");
        for round in 1..=3 {
            // Under way when it is cut, and while nobody is there.
            talk.host.write_all(&[round; 20_000]).unwrap();
            drop(wire);
            rig.attached(false);
            talk.host.write_all(&[round; 20_000]).unwrap();
            let began = Instant::now();
            wire = dial(&asker.question());
            rig.attached(true);
            talk.hear(&mut *wire, 6 + usize::from(round) * 40_000);
            assert!(began.elapsed() < MOMENT, "{word}: {:?}", began.elapsed());
            talk.say(&mut *wire, b"from the guest again");
        }
        assert_eq!(&talk.heard[..6], b"before");
        let rounds = (1..=3).flat_map(|round| [round; 40_000]);
        assert!(talk.heard[6..].iter().copied().eq(rounds), "{word}");
        assert_eq!(rig.comings(), Vec::<String>::new(), "{word}");
        let count = 3 * (u64::from(number) - 1);
        assert_eq!(counter(&rig.network, "network_link_back"), count, "{word}");
        std::mem::forget(wire);
    }
}

#[test]
fn another_guest_has_the_name_of_the_one_that_is_away_which_ends_first() {
    let mut rig = kept("other", LONG);
    let (dial, _file) = qemu(&rig);
    let mut wire = dial(&asker(2).question());
    asker(2).is_answered(&mut *wire);
    let mut talk = Talk::open(&rig, asker(2), &mut *wire);
    assert_eq!(rig.next_up().0, "web");
    drop(wire);
    rig.attached(false);
    let mut other = dial(&asker(3).question());
    asker(3).is_answered(&mut *other);
    talk.is_over();
    let closed = format!("closed {:?}", FlowEnd::VmDown);
    assert_eq!(rig.comings(), [closed.as_str(), "down", "up web"]);
    assert_eq!(rig.network.guest_at(IpAddr::V4(asker(2).address)), None);
    // The first, when it comes back after all, is another.
    let mut first = dial(&asker(2).question());
    asker(2).is_answered(&mut *first);
    assert_eq!(rig.comings(), ["up web-2"]);
    assert_eq!(counter(&rig.network, "network_link_back"), 0);
}

#[test]
fn beside_other_guests_another_has_a_name_of_its_own_and_ends_nobody() {
    let mut rig = kept("beside", LONG);
    let (dial, _file) = qemu(&rig);
    let mut wires: Vec<_> = [2, 3].map(|number| answered(&dial, number)).into();
    let mut talk = Talk::open(&rig, asker(3), &mut *wires[1]);
    assert_eq!(rig.comings(), ["up web", "up web-2"]);
    rig.open_all();
    // Both are cut, as by a relay; one is away still when another comes, and the other when that has come.
    drop(wires);
    rig.attached(false);
    rig.attached(false);
    let mut other = dial(&asker(4).question());
    asker(4).is_answered(&mut *other);
    let mut second = dial(&asker(3).question());
    talk.say(&mut *second, b"here still");
    let mut first = dial(&asker(2).question());
    asker(2).is_answered(&mut *first);
    assert_eq!(rig.comings(), ["up web-3"]);
    assert_eq!(counter(&rig.network, "network_link_back"), 2);
}

#[test]
fn who_is_under_a_policy_sheds_no_name_by_coming_back_with_another_address() {
    let grace = Duration::from_millis(700);
    let mut rig = kept("shed", grace);
    let (dial, _file) = qemu(&rig);
    let mut wires: Vec<_> = [2, 3].map(|number| answered(&dial, number)).into();
    assert_eq!(rig.comings(), ["up web", "up web-2"]);
    let began = Instant::now();
    drop(wires.remove(0));
    rig.attached(false);
    let mut changed = dial(&asker(4).question());
    asker(4).is_answered(&mut *changed);
    assert!(began.elapsed() >= grace, "{:?}", began.elapsed());
    assert_eq!(rig.comings(), ["down", "up web"]);
}

#[test]
fn when_its_time_is_over_a_guest_ends_and_the_next_begins_anew() {
    let grace = Duration::from_millis(400);
    let mut rig = kept("over", grace);
    let (dial, _file) = qemu(&rig);
    let mut wire = dial(&asker(2).question());
    asker(2).is_answered(&mut *wire);
    let mut talk = Talk::open(&rig, asker(2), &mut *wire);
    rig.next_up();
    let began = Instant::now();
    drop(wire);
    rig.attached(false);
    // One that says nothing waits for it, and then has its name.
    let silent = UnixStream::connect(rig.path("qemu")).unwrap();
    talk.is_over();
    rig.next_down();
    assert!(
        (grace..MOMENT).contains(&began.elapsed()),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(rig.next_up().0, "web");
    assert_eq!(counter(&rig.network, "network_link_given_up"), 1);
    let mut silent = Stream::new(silent, StreamKind::Qemu);
    asker(2).is_answered(&mut silent);
    assert_eq!(counter(&rig.network, "network_link_back"), 0);
}

#[test]
fn a_guest_that_never_spoke_and_one_whose_link_failed_are_not_kept() {
    let mut rig = kept("spoke", LONG);
    let (dial, _file) = qemu(&rig);
    let silent = UnixStream::connect(rig.path("qemu")).unwrap();
    rig.next_up();
    drop(silent);
    rig.next_down();
    let _wire = dial(&[0; 13]);
    rig.next_up();
    drop(_wire);
    rig.next_down();

    let mut wire = Stream::new(UnixStream::connect(rig.path("qemu")).unwrap(), StreamKind::Qemu);
    asker(2).is_answered(&mut wire);
    wire.socket.write_all(&[0xff; 4]).unwrap();
    let error = rig.report(|report| match report {
        Report::VmDown { link_error, .. } => Some(link_error),
        _ => None,
    });
    assert!(
        error.is_some_and(|e| e.contains("4294967295 bytes was announced")),
        "it is told as an error"
    );
    // Of somebody who has yet to show who he is, while another is away.
    let mut wire = dial(&asker(2).question());
    asker(2).is_answered(&mut *wire);
    drop(wire);
    rig.attached(false);
    let mut absurd = UnixStream::connect(rig.path("qemu")).unwrap();
    absurd.set_read_timeout(Some(PATIENCE)).unwrap();
    absurd.write_all(&[0xff; 8]).unwrap();
    rig.counts("network_link_unknown", 1);
    assert!(was_closed(&absurd, true));
    let mut wire = dial(&asker(2).question());
    rig.attached(true);
    asker(2).is_answered(&mut *wire);
}

#[test]
fn who_says_nothing_keeps_nobody_from_coming_back_nor_from_coming() {
    let mut rig = kept("silent", LONG);
    let (dial, _file) = qemu(&rig);
    let mut wire = dial(&asker(2).question());
    asker(2).is_answered(&mut *wire);
    let mut second = dial(&asker(3).question());
    asker(3).is_answered(&mut *second);
    assert_eq!(rig.comings(), ["up web", "up web-2"]);
    rig.open_all();
    drop(wire);
    rig.attached(false);
    let mut silent: Vec<_> = (0..20)
        .map(|_| UnixStream::connect(rig.path("qemu")).unwrap())
        .collect();
    // Runts show nobody, and half a frame does not either.
    silent[0].write_all(&[0, 0, 0, 3, 1, 2, 3].repeat(100)).unwrap();
    silent[1].write_all(&[0, 0, 0, 60, 1, 2]).unwrap();
    let began = Instant::now();
    let mut other = dial(&asker(4).question());
    asker(4).is_answered(&mut *other);
    // Who goes again was nobody.
    silent.truncate(2);
    let mut back = dial(&asker(2).question());
    asker(2).is_answered(&mut *back);
    assert!(began.elapsed() < MOMENT, "{:?}", began.elapsed());
    assert_eq!(counter(&rig.network, "network_link_back"), 1);
    // Now that nobody is away they need not say anything. A runt is counted as their guest's.
    let (mut names, mut runts) = (Vec::new(), 0);
    while names.len() < 3 || runts < 100 {
        rig.report(|report| match report {
            Report::VmUp(up) => {
                names.push(up.name);
                Some(())
            }
            Report::VmStatus(status) => {
                runts = runts.max(status.dropped_frames.get("malformed").copied().unwrap_or(0));
                Some(())
            }
            _ => None,
        });
    }
    // Each tells of itself.
    names.sort_unstable();
    assert_eq!(names, ["web-3", "web-4", "web-5"]);
}

/// So many that connect to QEMU's socket and say this, one after the other: each is there before the next comes.
fn crowd(rig: &Rig, count: usize, said: &[u8]) -> Vec<UnixStream> {
    let one = |_| {
        let mut one = UnixStream::connect(rig.path("qemu")).unwrap();
        one.set_read_timeout(Some(PATIENCE)).unwrap();
        one.write_all(said).unwrap();
        one
    };
    (0..count).map(one).collect()
}

/// Whether the other end closed it, which is waited for if it is `to` be; what it was asked before is passed over.
fn was_closed(mut stream: &UnixStream, to: bool) -> bool {
    stream.set_nonblocking(!to).unwrap();
    loop {
        match stream.read(&mut [0; 512]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

#[test]
fn of_those_who_have_yet_to_say_who_they_are_the_longest_there_makes_way() {
    let mut rig = kept("limit", LONG);
    let (dial, _file) = qemu(&rig);
    let mut wire = dial(&asker(2).question());
    asker(2).is_answered(&mut *wire);
    drop(wire);
    rig.attached(false);
    let silent = crowd(&rig, UNDECIDED_MAX, &[]);
    let further = crowd(&rig, 3, &[]);
    rig.counts("network_link_limit", 3);
    assert!(silent[..3].iter().all(|stream| was_closed(stream, true)));
    let mut left = silent[3..].iter().chain(&further);
    assert!(left.all(|stream| !was_closed(stream, false)));
    // Who is away comes back at once, and pushes out one more of them at most.
    let began = Instant::now();
    let mut back = dial(&asker(2).question());
    asker(2).is_answered(&mut *back);
    assert!(began.elapsed() < MOMENT, "{:?}", began.elapsed());
    assert_eq!(counter(&rig.network, "network_link_back"), 1);
    assert!(counter(&rig.network, "network_link_limit") <= 4);
    assert_eq!(rig.comings(), Vec::<String>::new());
}

#[test]
fn who_dials_without_end_and_says_nothing_keeps_nobody_from_coming_back() {
    let mut rig = kept("hail", LONG);
    let (dial, _file) = qemu(&rig);
    let mut wire = dial(&asker(2).question());
    asker(2).is_answered(&mut *wire);
    let mut talk = Talk::open(&rig, asker(2), &mut *wire);
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, path) = (Arc::clone(&stop), rig.path("qemu"));
    let hail = std::thread::spawn(move || {
        let mut held = std::collections::VecDeque::new();
        while !stopped.load(Ordering::Relaxed) {
            held.push_back(UnixStream::connect(&path).unwrap());
            // As many as there may be, and as may wait, are held open all the time.
            if held.len() > 2 * UNDECIDED_MAX {
                held.pop_front();
            }
        }
    });
    drop(wire);
    rig.attached(false);
    rig.counts("network_link_limit", 1_000);
    for _ in 0..3 {
        let began = Instant::now();
        let mut back = dial(&asker(2).question());
        rig.attached(true);
        talk.say(&mut *back, b"here again");
        assert!(began.elapsed() < MOMENT, "{:?}", began.elapsed());
        drop(back);
        rig.attached(false);
    }
    stop.store(true, Ordering::Relaxed);
    hail.join().unwrap();
    assert_eq!(counter(&rig.network, "network_link_back"), 3);
}

#[test]
fn where_all_have_spoken_before_the_door_who_comes_is_turned_away() {
    let mut rig = kept("spoken", LONG);
    let (dial, _file) = qemu(&rig);
    // Two, so that neither is alone; both are under a policy, and so another waits for them.
    let wires = [2, 3].map(|number| answered(&dial, number));
    drop(wires);
    rig.attached(false);
    rig.attached(false);
    let hello = Stream::new(UnixStream::pair().unwrap().0, StreamKind::Qemu).frame(&asker(9).question());
    let spoken = crowd(&rig, UNDECIDED_MAX, &hello);
    let late = crowd(&rig, 1, &hello);
    rig.counts("network_link_limit", 1);
    assert!(was_closed(&late[0], true));
    assert!(spoken.iter().all(|stream| !was_closed(stream, false)));
    assert_eq!(counter(&rig.network, "network_link_limit"), 1);
}

#[test]
fn a_guest_that_has_said_nothing_makes_way_for_one_that_speaks_and_for_no_other() {
    let mut rig = kept("places", LONG);
    let (dial, _file) = qemu(&rig);
    let silent = crowd(&rig, GUESTS_MAX, &[]);
    let names: std::collections::HashSet<String> = (0..GUESTS_MAX).map(|_| rig.next_up().0).collect();
    assert_eq!(names.len(), GUESTS_MAX);
    // One that says nothing either waits for a place, and takes none.
    let waits = crowd(&rig, 1, &[]);
    // The first guest, which has not said anything until now, does so before it is its turn.
    let mut first = Stream::new(silent[0].try_clone().unwrap(), StreamKind::Qemu);
    asker(2).is_answered(&mut first);
    let mut speaks = dial(&asker(3).question());
    asker(3).is_answered(&mut *speaks);
    assert_eq!(counter(&rig.network, "network_link_limit"), 1);
    let closed: Vec<_> = silent[1..]
        .iter()
        .map(|stream| was_closed(stream, false))
        .collect();
    assert_eq!(closed.iter().filter(|closed| **closed).count(), 1);
    assert!(!was_closed(&waits[0], false));
    asker(2).is_answered(&mut first);
    // The place of the one that went is the speaker's.
    rig.next_down();
    assert_eq!(rig.next_up().0, "web-2");
    // And one that comes back has its own place.
    drop(speaks);
    rig.attached(false);
    let mut back = dial(&asker(3).question());
    asker(3).is_answered(&mut *back);
    assert_eq!(counter(&rig.network, "network_link_back"), 1);
    assert_eq!(counter(&rig.network, "network_link_limit"), 1);
}

#[test]
fn a_hypervisor_may_be_back_before_it_was_noticed_that_it_had_gone() {
    let mut rig = kept("notice", LONG);
    let (dial, _file) = qemu(&rig);
    let mut wire = dial(&asker(2).question());
    asker(2).is_answered(&mut *wire);
    let mut talk = Talk::open(&rig, asker(2), &mut *wire);
    let mut next = dial(&asker(2).question());
    std::thread::sleep(Duration::from_millis(100));
    drop(wire);
    talk.say(&mut *next, b"over the new one");
    assert_eq!(rig.comings(), ["up web"]);
    // One that goes on speaking over the old link keeps it, and the other is nobody.
    let _impostor = dial(&asker(2).question());
    assert_eq!(rig.next_up().0, "web-2");
    talk.say(&mut *next, b"over the old one");
    assert_eq!(rig.comings(), [""; 0]);
    rig.dropped("spoofed_mac", 1);
}

#[test]
fn those_away_end_at_once_with_the_network_and_nobody_comes_in_their_place() {
    let mut rig = kept("stop", LONG);
    let (dial, _file) = qemu(&rig);
    let mut wire = dial(&asker(2).question());
    asker(2).is_answered(&mut *wire);
    rig.next_up();
    drop(wire);
    rig.attached(false);
    let _silent = UnixStream::connect(rig.path("qemu")).unwrap();
    let began = Instant::now();
    rig.network.stop();
    rig.next_down();
    assert!(began.elapsed() < MOMENT, "{:?}", began.elapsed());
    // Who comes now is closed at once, perhaps before it has spoken.
    let mut late = UnixStream::connect(rig.path("qemu")).unwrap();
    late.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = late.write_all(&asker(2).question());
    assert!(is_closed(&mut late));
    assert_eq!(rig.comings(), Vec::<String>::new());
}

#[test]
fn a_guest_without_a_link_keeps_its_address_and_its_hardware_address() {
    let mut rig = kept("leases", LONG);
    let (dial, _file) = qemu(&rig);
    let mut wire = dial(&asker(2).question());
    asker(2).is_answered(&mut *wire);
    drop(wire);
    rig.attached(false);
    let owner = rig.network.guest_at(IpAddr::V4(asker(2).address));
    assert!(owner.is_some());
    assert!(rig.network.has_station(asker(2).mac));
    let mut back = dial(&asker(2).question());
    asker(2).is_answered(&mut *back);
    assert_eq!(rig.network.guest_at(IpAddr::V4(asker(2).address)), owner);
}

/// A link over `--listen` from this VM, over which this frame has gone already.
fn dial_from(entrance: &Arc<Entrance>, cid: u32, first: &[u8]) -> Stream {
    let (here, there) = UnixStream::pair().unwrap();
    let wire = Stream::new(there, StreamKind::Connect);
    entrance.attach(HostStream::from(here), Some(Cid(cid)), &wire.frame(first));
    wire
}

#[test]
fn a_vm_known_by_its_number_is_one_guest_and_has_one_name() {
    for grace in [Duration::ZERO, LONG] {
        let mut rig = kept("one", grace);
        let entrance = Entrance::new(&rig.network, spec());
        let mut wire = dial_from(&entrance, 3, &asker(2).question());
        asker(2).is_answered(&mut wire);
        // Of another address too: it would be another name.
        let began = Instant::now();
        for (refused, number) in (1..).zip([2, 4]) {
            let mut further = dial_from(&entrance, 3, &asker(number).question());
            rig.counts("network_link_further", refused);
            assert!(is_closed(&mut further.socket));
        }
        assert!(began.elapsed() < MOMENT, "{:?}", began.elapsed());
        if !grace.is_zero() {
            // The first was sent something: if nobody had been there any more, it would be over.
            assert_eq!(wire.receive()[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        }
        asker(2).is_answered(&mut wire);
        assert_eq!(rig.comings(), ["up web"]);
        // Another VM is let in at once.
        let mut other = dial_from(&entrance, 4, &asker(3).question());
        asker(3).is_answered(&mut other);
        assert_eq!(rig.comings(), ["up web-2"]);
    }
}

#[test]
fn a_network_is_open_while_nothing_is_said_of_any_guest_and_it_is_known() {
    let rig = kept("open", LONG);
    assert!(rig.network.is_open(), "nobody is there");
    let (dial, _file) = qemu(&rig);
    let _wires = [2, 3].map(|number| answered(&dial, number));
    assert!(!rig.network.is_open());
    rig.open_all();
    assert!(rig.network.is_open());
    let second = rig.network.guest_at(IpAddr::V4(asker(3).address)).unwrap();
    let settings = Settings::unsaid("web-2".to_owned(), LONG, LONG);
    rig.network.send(second, Input::Order(Order::Settings(settings)));
    assert!(!rig.network.is_open());
}

#[test]
fn of_many_links_that_a_vm_dials_at_once_one_is_let_in() {
    let mut rig = kept("many", LONG);
    let entrance = Entrance::new(&rig.network, spec());
    let wires: Vec<Stream> = std::thread::scope(|scope| {
        let dialling: Vec<_> = (0..20)
            .map(|_| scope.spawn(|| dial_from(&entrance, 3, &asker(2).question())))
            .collect();
        dialling
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    rig.counts("network_link_further", 19);
    assert_eq!(rig.comings(), ["up web"]);
    drop(wires);
}

#[test]
fn nobody_is_a_guest_that_is_away_but_its_own_vm() {
    let mut rig = kept("own", LONG);
    let entrance = Entrance::new(&rig.network, spec());
    let mut wire = dial_from(&entrance, 3, &asker(2).question());
    asker(2).is_answered(&mut wire);
    let mut second = dial_from(&entrance, 4, &asker(3).question());
    asker(3).is_answered(&mut second);
    let mut talk = Talk::open(&rig, asker(2), &mut wire);
    assert_eq!(rig.comings(), ["up web", "up web-2"]);
    drop(wire);
    rig.attached(false);
    // It speaks as the one that is away.
    let _thief = dial_from(&entrance, 5, &asker(2).question());
    assert_eq!(rig.next_up().0, "web-3");
    rig.dropped("spoofed_mac", 1);
    let mut back = dial_from(&entrance, 3, &asker(2).question());
    talk.say(&mut back, b"here still");
    assert_eq!(counter(&rig.network, "network_link_back"), 1);
    // With another address it has the same name, though it is under a policy and not alone, and nothing else.
    drop(back);
    rig.attached(false);
    let mut changed = dial_from(&entrance, 3, &asker(4).question());
    asker(4).is_answered(&mut changed);
    talk.is_over();
    let closed = format!("closed {:?}", FlowEnd::VmDown);
    assert_eq!(rig.comings(), [closed.as_str(), "down", "up web"]);
}

#[test]
fn a_vm_that_dials_without_end_keeps_no_other_from_coming_back() {
    let mut rig = kept("endless", LONG);
    let entrance = Entrance::new(&rig.network, spec());
    let mut hog = dial_from(&entrance, 3, &asker(2).question());
    asker(2).is_answered(&mut hog);
    let mut wire = dial_from(&entrance, 4, &asker(3).question());
    asker(3).is_answered(&mut wire);
    assert_eq!(rig.comings(), ["up web", "up web-2"]);
    drop(wire);
    rig.attached(false);
    let further: Vec<_> = (0..2 * UNDECIDED_MAX)
        .map(|_| dial_from(&entrance, 3, &[0; 13]))
        .collect();
    let mut back = dial_from(&entrance, 4, &asker(3).question());
    asker(3).is_answered(&mut back);
    assert_eq!(counter(&rig.network, "network_link_back"), 1);
    rig.counts("network_link_further", further.len() as u64);
    assert_eq!(counter(&rig.network, "network_link_limit"), 0);
    assert_eq!(rig.comings(), Vec::<String>::new());
}
