//! stub
#[derive(Clone)] pub struct Zones;
