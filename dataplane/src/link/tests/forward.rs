//! A forward's socket whose guest has its address no more: the one that has it now reads it.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use vnet_proto::model::VmId;

use super::*;
use crate::message::{ForwardId, Input, Router as _};
use crate::network::tests::release;

const TARGET: [u8; 4] = [192, 168, 127, 2];

/// A guest that asks with this MAC address for the target's.
fn guest(rig: &Rig, mac: u8) -> (Stream, VmId) {
    let (here, there) = UnixStream::pair().unwrap();
    let link = Link::Stream(StreamLink::new(here, StreamKind::Qemu, &[]).unwrap());
    let mut wire = Stream::new(there, StreamKind::Qemu);
    rig.network.attach(link, spec()).unwrap();
    let asker = Asker {
        mac: Mac([2, 0, 0, 0, 0, mac]),
        address: TARGET.into(),
    };
    asker.is_answered(&mut wire);
    let vm = rig.network.guest_at(IpAddr::from(TARGET));
    (wire, vm.expect("it has the address"))
}

/// The payload of the next UDP datagram to a guest.
fn datagram(wire: &mut dyn Wire) -> Vec<u8> {
    loop {
        let frame = wire.receive();
        if frame[12..14] == [8, 0] && frame[23] == 17 {
            let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            return frame[14 + 28..14 + total].to_vec();
        }
    }
}

#[test]
fn a_forwards_client_reaches_whoever_has_the_address_now() {
    let rig = Rig::new("moves");
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let hand_over = |vm| {
        let held = Arc::new(());
        let alive = Arc::downgrade(&held);
        let input = Input::IngressUdp {
            forward: ForwardId(1),
            socket: socket.try_clone().unwrap(),
            target: SocketAddr::from((TARGET, 53)),
            keep_client: false,
            held,
        };
        assert!(rig.network.send(vm, input));
        alive
    };
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(socket.local_addr().unwrap()).unwrap();
    let (mut first, vm) = guest(&rig, 2);
    let first_has_it = hand_over(vm);
    client.send(b"one").unwrap();
    assert_eq!(datagram(&mut first), b"one");

    release(&rig.network, vm);
    let (mut second, other) = guest(&rig, 3);
    assert_ne!(vm, other);
    // Of the same client, before the other reads it.
    client.send(b"two").unwrap();
    let until = Instant::now() + PATIENCE;
    while first_has_it.strong_count() > 0 {
        assert!(Instant::now() < until, "it reads what is not its own");
        std::thread::yield_now();
    }
    let second_has_it = hand_over(other);
    assert_eq!(datagram(&mut second), b"two");
    assert_eq!(second_has_it.strong_count(), 1);
}
