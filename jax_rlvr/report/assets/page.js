// Everything in its place.

const runs = await unpack(find('data').textContent.trim());
head();
curves();
laws();
fans();
microscope();
dark.addEventListener('change', redraw);
document.body.dataset.ready = String(Math.round(performance.now()));
