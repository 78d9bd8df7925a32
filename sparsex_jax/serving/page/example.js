// Five invented notes, and a question about one of them.

export const INSTRUCTION = "Answer in one short sentence from the notes.";
export const QUESTION = "What is the access code of the dome?";

export const NOTES = [
  "Observatory of Kestrel Hill. The dome opens on clear nights, and schools may visit on Fridays. The great telescope has a brass tube and a walnut stand. The astronomer is Lucia Marenko. The access code of the dome is 3615. Nobody may touch the lens, and lamps must be red after sunset.",
  "Harbour office of Velmora. The harbour opens at dawn and closes when the bells ring. Boats longer than ten metres need a pilot. The harbour master is Jonas Pell. The access code of the lighthouse is 4173. Fuel is sold at the north pier, and fresh water is free for everyone who pays the mooring fee.",
  "Library of Brenholt. Books may be kept for three weeks, maps for one day only. The reading room is heated in winter and has forty seats. The librarian is Adela Finch. The access code of the map room is 9268. Visitors leave their bags at the door and speak softly.",
  "Bakery of Tarnow. The ovens are lit at two in the morning and the first bread is sold at six. On feast days there is plum cake with caraway. The baker is Paul Okoro. The access code of the flour store is 7540. Apprentices sweep the yard, feed the cat and carry the loaves to the market square.",
  "Botanical garden of Dolm. The glass house is warm all year and keeps orchids, ferns and one old lemon tree. Dogs wait outside. The gardener is Hana Weiss. The access code of the seed vault is 8092. Seeds are swapped on the first Sunday of the month.",
];
